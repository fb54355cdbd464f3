"""A picture of `warmgate bench policies`: every policy's capacity over ours, cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ops.bench.harness import BenchError
from ops.bench.policies import FRESH, OUR_ORDER, OURS, Row
from ops.bench.policies_report import column_name, column_of, ordered
from replicas.engine.order import OrderName

_MARKERS = "os^vD*PX<>h"
"""There are more policies than colours."""


def plot(rows: Sequence[Row], path: Path) -> None:
    """A line a policy, a row of panels a trace: first come, first served, and in our order. Raises BenchError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.key.situation == FRESH]
    traces = list(dict.fromkeys(row.key.trace for row in rows))
    figure = Figure(figsize=(12, 3.6 * len(traces)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(traces), 2, sharey="row", squeeze=False)
    orders: tuple[tuple[OrderName, str], ...] = (("fcfs", "first come, first served"), (OUR_ORDER, "shortest first"))
    for trace, beside in zip(traces, panels, strict=True):
        for (order, words), axes in zip(orders, beside, strict=True):
            _lines(axes, [row for row in rows if row.key.trace == trace], order)
            axes.set(title=f"{trace}, {words}", ylabel="capacity ÷ ours as it ships" if order == "fcfs" else None)
            axes.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: {error}") from error


def _lines(axes: Any, rows: Sequence[Row], order: OrderName) -> None:
    ours = {column_of(row): row.capacity for row in rows if row.key.policy == OURS}
    columns = ordered(column for column, capacity in ours.items() if capacity)
    axes.set_xticks(range(len(columns)), [column_name(column) for column in columns], fontsize="small", rotation=20)
    axes.axhline(1.0, color="black", linewidth=2)
    for number, policy in enumerate(dict.fromkeys(row.key.policy for row in rows if row.key.policy != OURS)):
        found = {column_of(row): row.capacity for row in rows if (row.key.policy, row.key.order) == (policy, order)}
        known = [(i, found[column] / ours[column]) for i, column in enumerate(columns) if column in found]
        style = {"marker": _MARKERS[number % len(_MARKERS)], "color": f"C{number % 10}", "markersize": 4}
        axes.plot([i for i, _ in known], [value for _, value in known], label=policy, **style)
