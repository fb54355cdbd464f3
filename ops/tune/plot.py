"""The pictures of a sweep: latency against request rate, and what every candidate does at most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ops.bench.load_spec import Quantiles
from ops.tune.errors import TuneError
from ops.tune.findings import Run
from ops.tune.report import LATENCY_PICTURE, THROUGHPUT_PICTURE, runs_of
from ops.tune.sweep import Plan, Side

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Latency: TypeAlias = Callable[[Run], Quantiles]


def plot(sides: Sequence[Side], plan: Plan, folder: Path) -> None:
    """Writes both as PNG. Raises TuneError."""
    measured = [side for side in sides if runs_of(side)]
    if measured:
        _save(_latency(measured, plan), folder / LATENCY_PICTURE)
        _save(_throughput(measured), folder / THROUGHPUT_PICTURE)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise TuneError(f"{path}: {error}") from error


def _latency(sides: Sequence[Side], plan: Plan) -> Figure:
    """TTFT and TPOT at every rate that was sent: a line for each engine's best candidate, dots for the others."""
    figure = _figure(11, 4.5)
    ttft, tpot = figure.subplots(1, 2)
    for number, side in enumerate(sides):
        _latencies(ttft, (side, f"C{number}"), lambda run: run.ttft)
        _latencies(tpot, (side, f"C{number}"), lambda run: run.tpot)
    for axes, limit_s, words in ((ttft, plan.slo.ttft_s, "first token"), (tpot, plan.slo.tpot_s, "each further token")):
        axes.axhline(1000 * limit_s, color="grey", linewidth=0.8, linestyle="--", label="SLO")
        axes.set(xlabel="requests sent a second", ylabel=f"milliseconds to {words}", yscale="log")
        _say_plainly(axes)
        axes.grid(alpha=0.3)
    ttft.legend(fontsize="small", frameon=False)
    return figure


def _say_plainly(axes: Axes) -> None:
    """Ticks that read 200, not 2 x 10^2, and two of them at least."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    margin = max(1.0, (5 * low / high) ** 0.5)  # between any limits so far apart lie two of 1, 2, 5, 10 …
    axes.set_ylim(low / margin, high * margin)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _latencies(axes: Axes, drawn: tuple[Side, str], latency: Latency) -> None:
    side, colour = drawn
    best = side.search.best
    for outcome in side.search.outcomes:
        if outcome.capacity is None:
            continue
        points = list(_points(outcome.capacity.runs, latency))
        if not points:
            continue
        rates, p50s, p99s = zip(*points, strict=True)
        if outcome is best:
            axes.plot(rates, p99s, "o-", color=colour, markersize=4, label=f"{side.name}, best: p99")
            axes.plot(rates, p50s, "o--", color=colour, markersize=4, label=f"{side.name}, best: p50")
        else:
            axes.plot(rates, p99s, ".", color=colour, alpha=0.35)


def _points(runs: Sequence[Run], latency: Latency) -> Iterator[tuple[float, float, float]]:
    """(rate, p50 ms, p99 ms) of runs whose quantiles were answered."""
    for run in runs:
        found = latency(run)
        if run.rate is not None and found.p50 is not None and found.p99 is not None:
            yield run.rate, 1000 * found.p50, 1000 * found.p99


def _throughput(sides: Sequence[Side]) -> Figure:
    """Output tokens a second, all requests at once, and at the best rate in time: a pair of bars a candidate."""
    rows = [
        (f"{side.name}: {side.subject.named(outcome.values)}", f"C{number}", outcome)
        for number, side in enumerate(sides)
        for outcome in side.search.outcomes
        if outcome.capacity is not None
    ]
    figure = _figure(9, 1.4 + 0.34 * len(rows))
    axes = figure.subplots()
    for y, (_, colour, outcome) in enumerate(rows):
        found = outcome.capacity
        assert found is not None, "rows have been measured"
        axes.barh(y, found.closed.output_tokens_per_s, height=0.7, color=colour, alpha=0.35)
        if found.best is not None:
            axes.barh(y, found.best.output_tokens_per_s, height=0.35, color=colour)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="output tokens a second: all at once (light), at the best rate in time (dark)")
    axes.grid(alpha=0.3, axis="x")
    return figure
