"""A pull as it goes on: a bar on a terminal, a line for each stage elsewhere and under NO_COLOR."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class PullProgress:
    """Shows what `ops.models.pull` reports through `report`."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._name = name
        self._stage = ""
        self._lively = console.is_terminal and not (console.is_dumb_terminal or console.no_color)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._lively,
        )
        self._task = self._bar.add_task(name, total=None)

    def report(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage and not self._lively:
            self._console.print(f"{self._name}: {stage}", soft_wrap=True, markup=False)
        self._stage = stage
        self._bar.update(self._task, description=f"{self._name}: {stage}", completed=done, total=total or None)

    def __enter__(self) -> PullProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
