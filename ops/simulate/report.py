"""What a simulation says at its end: a table for people, one JSON object for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.table import Table

from ops.simulate.bounds import infinite_cache_hit
from ops.simulate.cells import Finding
from ops.simulate.fleet import FleetSpec
from ops.simulate.trace import Trace


@dataclass(frozen=True, slots=True)
class Report:
    """All cells of one trace. `fleet`: what they have in common."""

    trace: Trace
    fleet: FleetSpec
    findings: Sequence[Finding]
    seconds: float

    def table(self) -> Table:
        """One row per cell; the best capacity (or attainment) of each fleet is marked."""
        adapters = any(f.summary["adapter_loads"] for f in self.findings)
        capacities = any(f.capacity is not None for f in self.findings)
        table = Table(title=self._title(), title_justify="left", caption=self._caption(), caption_justify="left")
        table.add_column("policy")
        for name in ("order", "replicas", "KV", *(("capacity",) if capacities else ("load", "in time"))):
            table.add_column(name, justify="right")
        for name in ("TTFT p50", "p95", "p99", "longest p99", "hits", "of LRU", "max/mean", "busy"):
            table.add_column(name, justify="right")
        if adapters:
            table.add_column("swaps", justify="right")
            table.add_column("of LRU", justify="right")
        for finding in self.findings:
            table.add_row(*self._row(finding, (capacities, adapters)))
        return table

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
            f"capacity: the largest load with {slo.attainment:.0%} in time",
            "load 1.0: prefill alone would keep the fleet busy if nothing were cached",
            "of LRU: against one LRU cache as large as all together",
            *self.trace.notes,
        ]
        return "\n".join(words)

    def _row(self, finding: Finding, columns: tuple[bool, bool]) -> list[str]:
        capacities, adapters = columns
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
        if adapters:
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
