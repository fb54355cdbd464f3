"""`warmgate bench policies`: the SLO capacity of every policy in every cell, simulated; same code, same figures.

A cell is a trace, a number of replicas, a KV size, an order in which replicas prefill, and a policy. Baselines are
tried first come, first served, as the programs they come from run, and once more with our order; ours with its own
order, as it ships. What is found is kept as JSON lines, so that a run that was ended goes on where it was;
a new file belongs to new code.

    workloads × grid ─► cells ─ those not in the file ─► ops.simulate.cells ─► rows ─► ops.bench.policies_report
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path

import msgspec

from configs.schema import AdmissionConfig
from ops.bench.harness import BenchError
from ops.simulate.capacity import Search
from ops.simulate.cells import Cell, Crew, Finding, find_all
from ops.simulate.fleet import FleetSpec
from ops.simulate.formats import load_trace, sniff
from ops.simulate.readers import SessionOptions, read_sessions
from ops.simulate.replica import ReplicaSpec
from ops.simulate.trace import Trace
from replicas.engine.order import OrderName
from routing.policies import POLICIES

OURS = "warm"
OUR_ORDER: OrderName = "shortest"

BLIND = (
    "round_robin", "power_of_two", "least_outstanding", "chwbl", "cache_aware", "cache_aware_sglang", "prefix_affinity",
)  # fmt: skip
"""The rules that get along without KV events, by which a fleet is served today."""

MANY = 64
"""From so many replicas on only the three best baselines are tried."""

SESSION_BLOCK_TOKENS = 512
"""Blocks of sessions, as coarse as Mooncake's: hundreds of thousands of tokens a prompt are simulated sooner."""

KINDS = {"conversation": "conversation", "synthetic": "synthetic", "session": "agentic", "agentic": "agentic"}
"""What is in a file's name, and what the workload is called then."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace and the name it has in tables; goals hang on the name (`ops.bench.policies_report`)."""

    name: str
    trace: Trace

    @classmethod
    def read(cls, path: Path, num_requests: int) -> Workload:
        """The first requests of a trace file; raises TraceError."""
        if sniff(path) == "sessions":
            trace = read_sessions(path, SessionOptions(block_tokens=SESSION_BLOCK_TOKENS))
        else:
            trace = load_trace(path)
        name = next((kind for part, kind in KINDS.items() if part in path.name), path.name.partition(".")[0])
        return cls(name, trace.head(num_requests))


class Situation(msgspec.Struct, frozen=True):
    """How much an ingress knows. `events_delay_s` None: Redis is gone, nothing is known but what it sent itself."""

    stats_delay_s: float = 0.0
    events_delay_s: float | None = 0.0
    ingresses: int = 1


FRESH = Situation()

STALE = {
    "KV events 500 ms late": Situation(events_delay_s=0.5),
    "KV events and states 500 ms late": Situation(0.5, 0.5),
    "no Redis, 1 ingress": Situation(events_delay_s=None),
    "no Redis, 2 ingresses": Situation(events_delay_s=None, ingresses=2),
}
"""What ours is tried with beside fresh knowledge, and what that is called."""


class Key(msgspec.Struct, frozen=True):
    """What tells one row from another. `tolerance`: of the capacity search."""

    trace: str
    num_requests: int
    policy: str
    order: OrderName
    num_replicas: int
    kv_tokens: int
    situation: Situation = FRESH
    tolerance: float = 0.01


class Row(msgspec.Struct, frozen=True):
    """What came of a cell; the figures are those at its capacity. `of_pooled_lru`: hits over those of one LRU cache as
    large as all together."""

    key: Key
    capacity: float
    hit_ratio: float
    of_pooled_lru: float
    ttft_p50_s: float
    ttft_p99_s: float
    ttft_p99_longest_tenth_s: float
    prefill_max_over_mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is tried with every workload. Replicas in this order: what is usual first."""

    replicas: tuple[int, ...] = (8, 4, 16, 64)
    kv_tokens: tuple[int, ...] = (512_000, 4_000_000)
    policies: tuple[str, ...] = tuple(POLICIES)
    tolerance: float = 0.01
    stale_workload: str = "conversation"
    stale_replicas: int = 8

    def keys(self, workload: Workload, num_replicas: int, rows: Sequence[Row]) -> Iterator[Key]:
        """The cells at so many replicas; `rows` say who the best are, where only those are tried."""
        for kv_tokens in self.kv_tokens:
            at = Key(workload.name, len(workload.trace.requests), OURS, OUR_ORDER, num_replicas, kv_tokens)
            at = msgspec.structs.replace(at, tolerance=self.tolerance)
            orders: tuple[OrderName, ...] = ("fcfs", OUR_ORDER)
            for order in orders:
                for policy in self._policies(at, order, rows):
                    yield msgspec.structs.replace(at, policy=policy, order=order)
            if (workload.name, num_replicas) == (self.stale_workload, self.stale_replicas) and OURS in self.policies:
                for situation in STALE.values():
                    yield msgspec.structs.replace(at, situation=situation)

    def num_cells(self, workloads: Sequence[Workload]) -> int:
        """How many cells there are at most."""
        return sum(len(list(self.keys(w, num, ()))) for num in self.replicas for w in workloads)

    def _policies(self, at: Key, order: OrderName, rows: Sequence[Row]) -> Iterator[str]:
        """Ours in our order only; among many replicas the three best baselines of the next smaller fleet, one of which
        is of those without events."""
        if OURS in self.policies and order == OUR_ORDER:
            yield OURS
        baselines = [policy for policy in self.policies if policy != OURS]
        if at.num_replicas >= MANY:
            baselines = best_three(at, order, rows) or baselines
        yield from baselines


def best_three(at: Key, order: OrderName, rows: Sequence[Row]) -> list[str]:
    """The best baselines at the next fewer replicas, the best first; none where nothing is known."""
    alike = [row for row in rows if row.key.policy != OURS and _like(row.key, at) and row.key.order == order]
    fewer = max((row.key.num_replicas for row in alike if row.key.num_replicas < at.num_replicas), default=None)
    ranked = sorted((row for row in alike if row.key.num_replicas == fewer), key=lambda row: -row.capacity)
    names = [row.key.policy for row in ranked]
    blind = [name for name in names if name in BLIND]
    best = names[:3]
    if blind and not set(best) & set(blind):
        best[-1] = blind[0]
    return best


def _like(one: Key, other: Key) -> bool:
    """Whether they differ in policy, order and number of replicas at most."""
    same = {"policy": "", "order": OUR_ORDER, "num_replicas": 0}
    return msgspec.structs.replace(one, **same) == msgspec.structs.replace(other, **same)


@dataclass(slots=True)
class Findings:
    """Rows found so far, kept in `path` as JSON lines where there is one."""

    path: Path | None = None
    rows: dict[Key, Row] = field(default_factory=dict)

    @classmethod
    def opened(cls, path: Path | None) -> Findings:
        """With what an earlier run found; raises BenchError for a file of something else."""
        found = cls(path)
        if path is not None and path.exists():
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                try:
                    row = msgspec.json.decode(line, type=Row)
                except msgspec.DecodeError as error:
                    raise BenchError(f"{path}, line {number}: no finding of `bench policies`: {error}") from error
                found.rows[row.key] = row
        return found

    def add(self, row: Row) -> None:
        self.rows[row.key] = row
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(msgspec.json.encode(row) + b"\n")


def near(rows: Sequence[Row], key: Key) -> float | None:
    """The capacity of the most similar cell among these, whatever its number of replicas, KV size and news."""

    def distance(other: Key) -> float:
        return sum(abs(log(getattr(key, name) / getattr(other, name))) for name in ("num_replicas", "kv_tokens"))

    alike = [row for row in rows if _same_side(row.key, key) and row.capacity]
    return min(alike, key=lambda row: distance(row.key)).capacity if alike else None


def _same_side(one: Key, other: Key) -> bool:
    return (one.trace, one.policy, one.order) == (other.trace, other.policy, other.order)


@dataclass(frozen=True, slots=True)
class Work:
    """How cells are run: `num_workers` at once; `told` hears of each that is known, new or from the file."""

    num_workers: int
    told: Callable[[Row], None]


def run(workloads: Sequence[Workload], grid: Grid, findings: Findings, work: Work) -> list[Row]:
    """Every cell of the grid, found or already known. Raises SimulationError."""
    rows: list[Row] = []
    for num_replicas in grid.replicas:
        for workload in workloads:
            keys = list(grid.keys(workload, num_replicas, rows))
            for key in keys:
                if key in findings.rows:
                    work.told(findings.rows[key])
            todo = [key for key in keys if key not in findings.rows]
            _find((workload, todo), tuple(rows), findings, work)
            rows += [findings.rows[key] for key in keys]
    return rows


def _find(todo: tuple[Workload, Sequence[Key]], before: Sequence[Row], findings: Findings, work: Work) -> None:
    """Searches begin near what came `before` in the grid, whoever is done first: so the figures are always the same."""
    workload, keys = todo
    by_cell = {cell_of(key): key for key in keys}

    def told(finding: Finding) -> None:
        row = row_of(by_cell[finding.cell], finding)
        findings.add(row)
        work.told(row)

    find_all(workload.trace, list(by_cell), Crew(work.num_workers, told, lambda cell: near(before, by_cell[cell])))


def cell_of(key: Key) -> Cell:
    """What is to be simulated."""
    fleet = FleetSpec(
        num_replicas=key.num_replicas,
        replica=ReplicaSpec(kv_tokens=key.kv_tokens, order=key.order),
        num_ingresses=key.situation.ingresses,
        stats_delay_s=key.situation.stats_delay_s,
        events_delay_s=key.situation.events_delay_s,
        look_ahead=AdmissionConfig().look_ahead,
    )
    return Cell(key.policy, fleet.as_bound(POLICIES[key.policy]), search=Search(key.tolerance))


def row_of(key: Key, finding: Finding) -> Row:
    """What is kept of a finding, to six digits."""
    s = finding.summary
    figures = (finding.capacity or 0.0, s["hit_ratio"], s["hit_of_pooled_lru"], s["ttft_p50_s"], s["ttft_p99_s"],
               s["ttft_p99_longest_tenth_s"], s["prefill_max_over_mean"])  # fmt: skip
    return Row(key, *[float(f"{figure:.6g}") for figure in figures])
