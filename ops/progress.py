"""Steps shown as they happen: a spinner on a terminal, plain lines elsewhere and under NO_COLOR."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.status import Status
from rich.text import Text


@dataclass(slots=True)
class Step:
    """One step under way; `note` is what is known about it now, shown beside its name."""

    name: str
    status: Status | None
    note: str = ""

    def tell(self, note: str) -> None:
        """Changes the note, on a terminal at once."""
        self.note = note
        if self.status is not None:
            self.status.update(Text(f"{self.name}  {note}"))


@dataclass(slots=True)
class Progress:
    """The console of `warmgate serve`. `clock` in seconds."""

    console: Console
    clock: Callable[[], float] = time.monotonic
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def lively(self) -> bool:
        return self.console.is_terminal and not self.console.no_color

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Shows a step while its body runs, then one line: what came of it and how long it took."""
        begin = self.clock()
        status = self.console.status(Text(name)) if self.lively else None
        step = Step(name, status)
        if status is not None:
            status.start()
        try:
            yield step
        except BaseException as error:
            failed = isinstance(error, Exception)
            self._line("failed" if failed else "stopped", step, begin, "red" if failed else "yellow")
            raise
        else:
            self._line("ok", step, begin, "green")
        finally:
            if status is not None:
                status.stop()

    def say(self, text: str, style: str = "") -> None:
        """One line as it is, never wrapped and never read as markup."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    def _line(self, outcome: str, step: Step, begin: float, style: str) -> None:
        if step.status is not None:
            step.status.stop()
        words = Text(f"{outcome:<8}", style=style)
        words.append(f"{step.name:<10} {self.clock() - begin:5.1f} s  {step.note}".rstrip(), style="default")
        self.console.print(words, soft_wrap=True)
