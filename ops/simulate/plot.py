"""Two pictures of a simulation: how long first tokens take, and how many come in time as load grows."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from ops.simulate.cells import NUM_CDF_POINTS, Finding
from ops.simulate.errors import SimulationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAST_S = 1e-3
"""What a logarithmic axis shows for nothing."""

_LEAST_SPAN = 5
"""Between any limits so far apart lie two of 1, 2, 5, 10 …"""


def plot(findings: Sequence[Finding], path: Path, title: str) -> None:
    """Writes TTFT CDFs and SLO attainment against load (PNG, SVG or PDF, by the name). Raises SimulationError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    cdf, attainment = figure.subplots(1, 2)
    ranks = [i / (NUM_CDF_POINTS - 1) for i in range(NUM_CDF_POINTS)]
    for finding in findings:
        name = label(finding, findings)
        cdf.plot([max(s, _LEAST_S) for s in finding.cdf_s], ranks, label=f"{name} at {finding.load:.2f}")
        loads, values = zip(*finding.curve, strict=True)
        attainment.plot(loads, values, marker="o", markersize=3, label=name)
    slo = findings[0].cell.fleet.slo
    cdf.set(xscale="log", xlabel="seconds to the first token", ylabel="part of the requests", ylim=(0, 1))
    attainment.axhline(slo.attainment, color="grey", linewidth=0.8, linestyle="--")
    attainment.set(xscale="log", xlabel="load (1.0 = prefill of the fleet, uncached)", ylabel="in time", ylim=(0, 1.02))
    say_plainly(cdf, [s for finding in findings for s in finding.cdf_s])
    say_plainly(attainment, [load for finding in findings for load, _ in finding.curve])
    for axes in (cdf, attainment):
        axes.grid(alpha=0.3)
    cdf.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise SimulationError(f"{path}: {error}") from error


def say_plainly(axes: Axes, values: Sequence[float]) -> None:
    """Limits around the values of a logarithmic axis, far enough apart for two ticks, which read 0.2, not 2 x 10^-1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = max(min(values), _LEAST_S), max(*values, _LEAST_S)
    margin = max(1.1, sqrt(_LEAST_SPAN * low / high))
    axes.set_xlim(low / margin, high * margin)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def label(finding: Finding, among: Sequence[Finding]) -> str:
    """The policy, with what tells it from the others of the same name."""
    words = [finding.cell.policy]
    fleets = [other.cell.fleet for other in among]
    fleet = finding.cell.fleet
    if len({f.replica.order for f in fleets}) > 1:
        words.append(fleet.replica.order)
    if len({f.num_replicas for f in fleets}) > 1:
        words.append(f"N={fleet.num_replicas}")
    if len({f.replica.kv_tokens for f in fleets}) > 1:
        words.append(f"{fleet.replica.kv_tokens / 1e6:g} M")
    return " ".join(words)
