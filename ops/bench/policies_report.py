"""What `warmgate bench policies` says: a table of capacities for each trace, ratios with their goals, stale knowledge.

It is no `ops.bench.report.Report`: there are no repeats, as figures do not vary, and policies are rows.
"""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from rich.console import Console

from ops.bench.harness import Goal
from ops.bench.policies import BLIND, FRESH, MANY, OUR_ORDER, OURS, STALE, Row, Situation
from ops.bench.report import describe_machine, markdown_table, rich_table
from ops.simulate.capacity import MAX_LOAD
from replicas.engine.order import OrderName

Column = tuple[int, int]
"""Replicas, KV tokens of each."""

OVER_BLIND = {"conversation": 2.2, "synthetic": 1.5, "agentic": 1.3}
OVER_EVENTS = 1.2
OVER_SAME_ORDER = 1.02

AMPLE_TOKENS = 4_000_000
HITS_AMPLE, HITS_SCARCE = 0.97, 0.92
FRESH_ENOUGH = 0.95

UNBOUNDED = 0.97 * MAX_LOAD
"""Capacities from here on are where the search ends: the trace is too short to fill such a fleet."""

TABLE_NOTES = (
    "Capacity: the largest load with 95 % of first tokens within max(1 s, 2 x own uncached prefill), in units of the "
    "load that would keep the fleet busy with prefill if nothing were cached.",
    "Left of the stroke replicas prefill first come, first served, right of it the shortest first, with which ours "
    f"ships. With {MANY} replicas and more: the three best baselines of the next smaller fleet.",
    "≥: the trace is too short to fill such a fleet, whatever its speed; ours over others is not judged there.",
    "Goals: `warm` in its own order over others as they come, and over all in the same order; hits at that capacity.",
)
"""What a reader of the tables must know."""


@dataclass(frozen=True, slots=True)
class PolicyRatio:
    """One figure of ours in every cell of a trace where it is known, with its goal there, if it has one."""

    trace: str
    name: str
    values: Mapping[Column, float]
    goals: Mapping[Column, Goal]

    @property
    def num_reached(self) -> int:
        return sum(self.goals[column].met_by(value) for column, value in self.values.items() if column in self.goals)


@dataclass(frozen=True, slots=True)
class PoliciesReport:
    """All rows of a run. `command` is what repeats it; `facts` say how the traces were cut."""

    rows: Sequence[Row]
    command: Sequence[str]
    facts: Mapping[str, Any]
    notes: Sequence[str] = ()
    date: datetime.date = field(default_factory=datetime.date.today)

    benchmark = "policies"
    title = "Policies: SLO capacity in every cell (simulated)"

    def ratios(self) -> list[PolicyRatio]:
        """Ours over others, trace by trace."""
        return [ratio for trace in self._traces() for ratio in _ratios(trace, _Cells(self.rows, trace)) if ratio.values]

    def as_json(self) -> dict[str, Any]:
        ratios = [
            {"trace": ratio.trace, "name": ratio.name, "replicas": column[0], "kv_tokens": column[1], "value": value}
            | ({"goal": str(goal), "reached": goal.met_by(value)} if (goal := ratio.goals.get(column)) else {})
            for ratio in self.ratios()
            for column, value in ratio.values.items()
        ]
        return {
            "benchmark": self.benchmark,
            "date": self.date.isoformat(),
            "machine": describe_machine(),
            "command": shlex.join(self.command),
            "facts": dict(self.facts),
            "notes": list(self.notes),
            "rows": msgspec.to_builtins(self.rows),
            "ratios": ratios,
        }

    def json_line(self) -> str:
        return msgspec.json.encode(self.as_json()).decode()

    def show(self, console: Console) -> None:
        """Prints the tables."""
        for title, header, lines in self._tables():
            console.print(rich_table(title, header, lines))
        for note in self._notes():
            console.print(f"• {note}", style="dim", markup=False)

    def markdown(self) -> str:
        """The section of docs/benchmarks.md."""
        parts = [f"## {self.title}", f"{self.date.isoformat()}, {describe_machine()}.",
                 f"```\n{shlex.join(self.command)}\n```"]  # fmt: skip
        for title, header, lines in self._tables():
            parts += [f"**{title}**", markdown_table(header, lines)]
        parts.append("\n".join(f"- {note}" for note in self._notes()))
        parts.append("Settings: `" + msgspec.json.encode(dict(self.facts)).decode() + "`")
        return "\n\n".join(parts)

    def _traces(self) -> list[str]:
        return list(dict.fromkeys(row.key.trace for row in self.rows))

    def _tables(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """(title, header, lines) of each."""
        for trace in self._traces():
            cells = _Cells(self.rows, trace)
            header = ["policy", *map(column_name, cells.columns)]
            lines = [[policy, *(cells.shown(policy, column) for column in cells.columns)] for policy in cells.policies]
            yield f"{trace}: capacity, first come first served / shortest prefill first", header, lines
        ratios = self.ratios()
        columns = ordered(column for ratio in ratios for column in ratio.values)
        header = ["trace", "ours over", "goal", *map(column_name, columns)]
        lines = [[ratio.trace, ratio.name, _goals(ratio), *(_value(ratio, c) for c in columns)] for ratio in ratios]
        yield "Ratios (✗: goal missed)", header, lines

    def _notes(self) -> list[str]:
        ratios = self.ratios()
        num = sum(len(ratio.goals) for ratio in ratios)
        score = f"{sum(ratio.num_reached for ratio in ratios)} of {num} goals reached."
        return [score, *TABLE_NOTES, *self.notes]


class _Cells:
    """The rows of one trace, by what they are asked for."""

    def __init__(self, rows: Sequence[Row], trace: str) -> None:
        own = [row for row in rows if row.key.trace == trace]
        self._rows = {(column_of(r), r.key.policy, r.key.order, r.key.situation): r for r in own}
        self.columns = ordered(map(column_of, own))
        self.policies = list(dict.fromkeys(row.key.policy for row in own))

    def row(self, column: Column, policy: str, order: OrderName, situation: Situation = FRESH) -> Row | None:
        return self._rows.get((column, policy, order, situation))

    def best(self, column: Column, order: OrderName, policies: Sequence[str]) -> float:
        """The best capacity among these baselines; 0 where none was tried."""
        rows = (self.row(column, policy, order) for policy in policies if policy != OURS)
        return max((row.capacity for row in rows if row is not None), default=0.0)

    def shown(self, policy: str, column: Column) -> str:
        rows = (self.row(column, policy, "fcfs"), self.row(column, policy, OUR_ORDER))
        if rows == (None, None):
            return ""
        return " / ".join("–" if row is None else _capacity(row) for row in rows)


def _ratios(trace: str, cells: _Cells) -> Iterator[PolicyRatio]:
    ours = {column: row for column in cells.columns if (row := cells.row(column, OURS, OUR_ORDER)) is not None}
    over_blind = OVER_BLIND.get(trace)
    rivals: list[tuple[str, OrderName, Sequence[str], float | None]] = [
        ("best of those without events, first come", "fcfs", BLIND, over_blind),
        ("overlap_cost, first come", "fcfs", ("overlap_cost",), OVER_EVENTS),
        ("greedy_ttft, first come", "fcfs", ("greedy_ttft",), OVER_EVENTS),
        ("best of all, same order", OUR_ORDER, cells.policies, OVER_SAME_ORDER),
    ]
    for name, order, policies, limit in rivals:
        values = {
            column: row.capacity / best for column, row in ours.items() if (best := cells.best(column, order, policies))
        }
        judged = [column for column in values if ours[column].capacity < UNBOUNDED]
        yield PolicyRatio(trace, name, values, {c: Goal.at_least(limit) for c in judged} if limit else {})
    hits = {column: row.of_pooled_lru for column, row in ours.items()}
    limits = {column: HITS_AMPLE if column[1] >= AMPLE_TOKENS else HITS_SCARCE for column in hits}
    yield PolicyRatio(trace, "hits of pooled LRU", hits, {c: Goal.at_least(limit) for c, limit in limits.items()})
    yield from _stale(trace, cells, ours)


def _stale(trace: str, cells: _Cells, ours: Mapping[Column, Row]) -> Iterator[PolicyRatio]:
    """Ours with late news over ours with fresh; with none at all, over the best baseline, which has what it reads."""
    for name, situation in STALE.items():
        found = {c: row for c in ours if (row := cells.row(c, OURS, OUR_ORDER, situation)) is not None}
        if situation.events_delay_s is None:
            best = {c: cells.best(c, "fcfs", cells.policies) for c in found}
            values = {c: row.capacity / best[c] for c, row in found.items() if best[c]}
            yield PolicyRatio(trace, f"best baseline, first come; ours with {name}", values, _at_least(1.0, values))
        else:
            values = {c: row.capacity / ours[c].capacity for c, row in found.items() if ours[c].capacity}
            yield PolicyRatio(trace, f"itself with fresh knowledge; {name}", values, _at_least(FRESH_ENOUGH, values))


def _at_least(limit: float, values: Mapping[Column, float]) -> dict[Column, Goal]:
    return {column: Goal.at_least(limit) for column in values}


def _capacity(row: Row) -> str:
    return f"{row.capacity:.3g}" if row.capacity < UNBOUNDED else f"≥ {row.capacity:.3g}"


def column_of(row: Row) -> Column:
    """The cell's fleet."""
    return row.key.num_replicas, row.key.kv_tokens


def ordered(columns: Any) -> list[Column]:
    """Each column once, small fleets first."""
    return sorted(set(columns))


def column_name(column: Column) -> str:
    """As in a table's head: replicas × KV tokens of each."""
    num_replicas, kv_tokens = column
    return (
        f"{num_replicas} × {kv_tokens / 1e6:g} M"
        if kv_tokens >= 1_000_000
        else f"{num_replicas} × {kv_tokens // 1000} k"
    )


def _goals(ratio: PolicyRatio) -> str:
    return ", ".join(dict.fromkeys(map(str, ratio.goals.values())))


def _value(ratio: PolicyRatio, column: Column) -> str:
    value, goal = ratio.values.get(column), ratio.goals.get(column)
    if value is None:
        return ""
    return f"{value:.3f}" if goal is None or goal.met_by(value) else f"{value:.3f} ✗"
