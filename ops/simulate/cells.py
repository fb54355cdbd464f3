"""Many simulations of one trace, several at once: a cell is one policy at one fleet, at one load or at its capacity."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from ops.simulate.bounds import pooled_lru_hit, pooled_lru_swap_rate
from ops.simulate.capacity import Search, capacity
from ops.simulate.driver import run
from ops.simulate.errors import SimulationError
from ops.simulate.fleet import FleetSpec
from ops.simulate.result import Result, quantile
from ops.simulate.trace import Trace

NUM_CDF_POINTS = 200


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to find out. `load`: None = the largest that is sustained, looked for with `search`."""

    policy: str
    fleet: FleetSpec
    load: float | None = None
    search: Search = field(default_factory=Search)


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of a cell. `capacity` is None where one load was asked for.

    `curve`: (load, attainment) of each load tried; `cdf_s`: evenly spaced quantiles of the TTFT at `load`.
    """

    cell: Cell
    load: float
    capacity: float | None
    summary: dict[str, Any]
    curve: tuple[tuple[float, float], ...]
    cdf_s: tuple[float, ...] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """The finding, with the settings that vary from cell to cell."""
        fleet = self.cell.fleet
        return {
            "policy": self.cell.policy,
            "replicas": fleet.num_replicas,
            "kv_tokens": fleet.replica.kv_tokens,
            "order": fleet.replica.order,
            "ingresses": fleet.num_ingresses,
            "stats_delay_s": fleet.stats_delay_s,
            "events_delay_s": fleet.events_delay_s,
            "max_ahead": fleet.max_ahead,
            "look_ahead": fleet.look_ahead,
            "load": self.load,
            "capacity": self.capacity,
            **self.summary,
            "curve": self.curve,
        }


def find(trace: Trace, cell: Cell, near: float | None = None) -> Finding:
    """Runs one cell. `near`: where its capacity may be, if somebody has an idea."""
    if cell.load is not None:
        result = run(trace, cell.policy, cell.fleet, cell.load)
        return _finding(trace, (cell, result), None, ((cell.load, result.attainment),))
    found = capacity(trace, cell.policy, cell.fleet, replace(cell.search, near=near or cell.search.near))
    return _finding(trace, (cell, found.result), found.load, found.curve)


def _finding(
    trace: Trace, ran: tuple[Cell, Result], found: float | None, curve: tuple[tuple[float, float], ...]
) -> Finding:
    cell, result = ran
    fleet = cell.fleet
    fitting = fleet.fitting(trace)
    order = sorted(range(len(fitting.requests)), key=lambda i: (result.arrivals_s[i], i))
    requests = [fitting.requests[i] for i in order]
    pooled = pooled_lru_hit(requests, trace.block_tokens, fleet.num_replicas * fleet.replica.kv_tokens)
    summary = dict(result.summary)
    summary["hit_of_pooled_lru"] = summary["hit_ratio"] / pooled if pooled else 1.0
    if summary["swap_rate"]:
        slots = fleet.num_replicas * fleet.replica.max_adapters
        summary["swaps_of_pooled_lru"] = summary["swap_rate"] / pooled_lru_swap_rate(requests, slots)
    ordered = sorted(result.ttfts_s)
    cdf_s = tuple(quantile(ordered, i / (NUM_CDF_POINTS - 1)) for i in range(NUM_CDF_POINTS))
    return Finding(cell, result.load, found, summary, curve, cdf_s)


def no_idea(_cell: Cell) -> float | None:
    """Where nothing is known about a capacity beforehand."""
    return None


@dataclass(frozen=True, slots=True)
class Crew:
    """How cells are run: `num_workers` at once; `told` hears of each as it ends; `near` is asked before each begins."""

    num_workers: int
    told: Callable[[Finding], None]
    near: Callable[[Cell], float | None] = no_idea


def find_all(trace: Trace, cells: Sequence[Cell], crew: Crew) -> list[Finding]:
    """Runs all cells. In the order of `cells`.

    Raises SimulationError when a worker dies, and what a cell raises.
    """
    num_workers = min(crew.num_workers, len(cells))
    if num_workers <= 1:
        one_by_one = []
        for cell in cells:
            one_by_one.append(find(trace, cell, crew.near(cell)))
            crew.told(one_by_one[-1])
        return one_by_one
    found: dict[int, Finding] = {}
    todo = iter(range(len(cells)))
    with _workers(trace, cells, num_workers) as connections:
        busy = set(connections)
        for connection in connections:
            _ask(connection, next(todo), cells, crew)
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                index, finding = _answer(ready)
                found[index] = finding
                crew.told(finding)
                following = next(todo, None)
                if following is None:
                    busy.discard(ready)
                else:
                    _ask(ready, following, cells, crew)
    return [found[index] for index in range(len(cells))]


def _ask(connection: Connection, index: int, cells: Sequence[Cell], crew: Crew) -> None:
    connection.send((index, crew.near(cells[index])))


def _answer(connection: Connection) -> tuple[int, Finding]:
    try:
        answer = connection.recv()
    except EOFError:
        raise SimulationError("a simulating process died; is there enough memory?") from None
    if isinstance(answer, BaseException):
        raise answer
    index, finding = answer
    return index, finding


@contextmanager
def _workers(trace: Trace, cells: Sequence[Cell], num: int) -> Iterator[list[Connection]]:
    """Processes that answer a cell's number with its finding; ended in any case.

    Forked where that can be: the trace is then shared, not copied.
    """
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    processes: list[BaseProcess] = []
    connections: list[Connection] = []
    try:
        for _ in range(num):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, trace, cells), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
        yield connections
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.terminate()
            process.join()


def _work(connection: Connection, trace: Trace, cells: Sequence[Cell]) -> None:
    try:
        while True:
            index, near = connection.recv()
            try:
                connection.send((index, find(trace, cells[index], near)))
            except Exception as error:
                connection.send(error)
    except (EOFError, OSError, KeyboardInterrupt):
        return


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
