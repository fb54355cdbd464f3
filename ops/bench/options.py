"""What the commands of `warmgate bench` share: options, progress, and what is done with a report."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from ops.bench.harness import BenchError, Notice, Plan
from ops.bench.report import record

PAGE = Path("docs/benchmarks.md")

T = TypeVar("T")

AT_LEAST_1 = click.IntRange(min=1)
repeats_option = click.option(
    "--repeats", default=5, show_default=True, type=AT_LEAST_1, help="Counted rounds; recorded figures need 5."
)
quick_option = click.option(
    "--quick", is_flag=True, is_eager=True, help="One short round: shows that it runs, measures nothing."
)


def _not_both(context: click.Context, _parameter: click.Parameter, recorded: bool) -> bool:
    if recorded and context.params.get("quick"):
        raise click.UsageError("--quick measures nothing, so there is nothing to --record")
    return recorded


record_option = click.option(
    "--record", "recorded", is_flag=True, callback=_not_both, help=f"Put the table into {PAGE}."
)
model_option = click.option("--model", default="smollm2-135m", show_default=True, help="Catalogue name or folder.")


def known(wanted: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    """The sides asked for, all when none are. Raises BadParameter for those that do not exist."""
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: there are {', '.join(names)}", param_hint="--side")
    return wanted or names


def plan_of(repeats: int, quick: bool) -> Plan:
    """Rounds to measure: one alone when it only has to run."""
    return Plan(1, 0) if quick else Plan(repeats)


def model_dir(model: str) -> Path:
    """The folder of a model named on the command line."""
    from configs.runtime import home_dir
    from configs.tokenizer import find_model

    return find_model(model, home_dir(os.environ))


def measured(begin: Callable[[Notice], Coroutine[Any, Any, T]]) -> T:
    """What a measurement gives, its progress told on stderr."""
    console = Console(stderr=True)
    with console.status("…") as status:
        return asyncio.run(_until_told(begin(lambda words: _say(console, status, words))))


async def _until_told(work: Coroutine[Any, Any, T]) -> T:
    """The report; SIGTERM (`timeout` sends it) ends every process that `work` began before it raises BenchError."""
    measuring = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, measuring.cancel)
    try:
        return await measuring
    except asyncio.CancelledError as error:
        raise BenchError("told to stop before the measurement was complete: no figures") from error


def _say(console: Console, status: Status, words: str) -> None:
    if console.is_terminal:
        status.update(escape(words))
    else:
        console.print(words, markup=False)


class Finished(Protocol):
    """What a benchmark leaves."""

    @property
    def benchmark(self) -> str: ...

    def show(self, console: Console) -> None: ...

    def markdown(self) -> str: ...

    def json_line(self) -> str: ...


def finish(report: Finished, recorded: bool) -> None:
    """Prints a report, and puts it into the page if it is to be recorded."""
    report.show(Console(width=None if Console().is_terminal else 200))
    if recorded:
        record(PAGE, report.benchmark, report.markdown())
    click.echo(report.json_line())
