"""What a simulation says at its end: a table for people, one JSON object for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ops.simulate.bounds import infinite_cache_hit
from ops.simulate.cells import Finding
from ops.simulate.fleet import FleetSpec
from ops.simulate.trace import Trace

_UNBOUNDED = 10_000


@dataclass(frozen=True, slots=True)
class Report:
    """All cells of one trace. `fleet`: what they have in common."""

    trace: Trace
    fleet: FleetSpec
    findings: Sequence[Finding]
    seconds: float

    def show(self, console: Console) -> None:
        """A row a run, its best capacity (or attainment) in each fleet marked.

        Where that is too wide, turned round: a column a run, in as many tables as it takes. No number is ever cut.
        """
        heads = self._heads()
        rows = [self._row(finding) for finding in self.findings]
        tables = [_table(heads, rows)]
        if _width(tables[0]) > console.width:
            tables = _turned(heads, rows, console.width)
        words: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
        console.print(self._title(), style="table.title", **words)
        for table in tables:
            console.width = max(console.width, _width(table))
            console.print(table)
        console.print(self._caption(), style="table.caption", **words)

    def as_json(self) -> dict[str, Any]:
        trace = self.trace
        return {
            "simulation": trace.name,
            "requests": len(trace.requests),
            "prompt_tokens": trace.num_prompt_tokens,
            "output_tokens": trace.num_output_tokens,
            "infinite_cache_hit": infinite_cache_hit(trace.requests, trace.block_tokens),
            "notes": trace.notes,
            "slo": msgspec.to_builtins(self.fleet.slo),
            "calibration": msgspec.to_builtins(self.fleet.replica.calibration),
            "max_num_batched_tokens": self.fleet.replica.max_num_batched_tokens,
            "stats_delay_s": self.fleet.stats_delay_s,
            "events_delay_s": self.fleet.events_delay_s,
            "seed": self.fleet.seed,
            "cells": [finding.as_json() for finding in self.findings],
            "seconds": round(self.seconds, 3),
        }

    def json_line(self) -> str:
        """The last line of the output."""
        return msgspec.json.encode(_rounded(self.as_json())).decode()

    def _title(self) -> str:
        trace = self.trace
        return f"{trace.name}: {len(trace.requests)} requests, {trace.num_prompt_tokens / 1e6:.1f} M prompt tokens"

    def _caption(self) -> str:
        slo = self.fleet.slo
        words = [
            f"in time: first token within max({slo.floor_s:g} s, {slo.factor:g} x own uncached prefill)",
            *([f"capacity: the largest load with {slo.attainment:.0%} in time"] if self._capacities else []),
            "load 1.0: prefill alone would keep the fleet busy if nothing were cached",
            "of LRU: against one LRU cache as large as all together",
            *self.trace.notes,
        ]
        return "\n".join(words)

    @property
    def _capacities(self) -> bool:
        return any(f.capacity is not None for f in self.findings)

    @property
    def _adapters(self) -> bool:
        return any(f.summary["adapter_loads"] for f in self.findings)

    def _heads(self) -> list[str]:
        return [
            *("policy", "order", "replicas", "KV", *(("capacity",) if self._capacities else ("load", "in time"))),
            *("TTFT p50", "p95", "p99", "longest p99", "hits", "of LRU", "max/mean", "busy"),
            *(("swaps", "of LRU") if self._adapters else ()),
        ]

    def _row(self, finding: Finding) -> list[str]:
        capacities = self._capacities
        fleet, s = finding.cell.fleet, finding.summary
        kv = fleet.replica.kv_tokens
        cells = [finding.cell.policy, fleet.replica.order, str(fleet.num_replicas), f"{kv / 1e6:g} M"]
        value = finding.capacity if capacities else s["attainment"]
        best = value is not None and value >= max(self._rivals(finding, capacities))
        shown = "–" if value is None else f"{value:.3f}" if capacities else f"{value:.1%}"
        cells += [] if capacities else [f"{finding.load:g}"]
        cells.append(f"[bold]{shown}[/bold]" if best else shown)
        cells += [seconds(s[key]) for key in ("ttft_p50_s", "ttft_p95_s", "ttft_p99_s", "ttft_p99_longest_tenth_s")]
        cells += [f"{s['hit_ratio']:.1%}", f"{s['hit_of_pooled_lru']:.3f}"]
        cells += [f"{s['prefill_max_over_mean']:.2f}", f"{s['busy']:.0%}"]
        if self._adapters:
            cells += [f"{s['swap_rate']:.3f}", f"{s.get('swaps_of_pooled_lru', 0.0):.3f}"]
        return cells

    def _rivals(self, finding: Finding, capacities: bool) -> list[float]:
        """The values of all cells with the same fleet but for the order, and the same load."""
        fleet = finding.cell.fleet
        mine = (fleet.num_replicas, fleet.replica.kv_tokens, finding.cell.load)
        values = []
        for other in self.findings:
            its = other.cell.fleet
            if (its.num_replicas, its.replica.kv_tokens, other.cell.load) == mine:
                values.append(other.capacity or 0.0 if capacities else float(other.summary["attainment"]))
        return values


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table()
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _turned(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[Table]:
    """Tables with a column a run, as many runs in each as fit; at least one."""

    def turned(runs: Sequence[Sequence[str]]) -> Table:
        first, *others = zip(heads, *runs, strict=True)
        return _table(first, others)

    groups: list[list[Sequence[str]]] = []
    for row in rows:
        if groups and _width(turned([*groups[-1], row])) <= width:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [turned(group) for group in groups]


def _width(table: Table) -> int:
    """Characters that nothing in it is cut in."""
    console = Console(width=_UNBOUNDED)
    return Measurement.get(console, console.options, table).maximum


def seconds(value: float) -> str:
    """Seconds for people: milliseconds where that says more."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _rounded(value: Any) -> Any:
    """Six significant digits: what is beyond differs between machines."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
