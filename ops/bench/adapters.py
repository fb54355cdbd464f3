"""`warmgate bench adapters`: swaps beside one pooled cache, waiting beside a router that knows no adapters.

A simulation (`ops.bench.adapter_model`): figures depend on seeds, not on the machine. A repeat is another seed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from ops.bench.adapter_model import (
    Outcome,
    Simulation,
    World,
    arrivals,
    by_cost,
    least_outstanding,
    pooled_lru,
    unqueued_p99_s,
)
from ops.bench.harness import Goal, Notice, Plan, Ratio, Sample, Samples
from ops.bench.report import Report
from ops.simulate.cells import num_cores

OURS, LEAST, POOLED = "homes", "least outstanding", "pooled LRU"
ZIPF = (0.8, 1.0, 1.2)


@dataclass(frozen=True, slots=True)
class Grid:
    """What is tried: `num_requests` each, a third of them before anything counts."""

    num_adapters: tuple[int, ...] = (100, 500, 1000)
    num_slots: tuple[int, ...] = (8, 32)
    loads: tuple[float, ...] = (0.6, 0.8, 0.9)
    num_requests: int = 48_000

    def swap_worlds(self) -> Iterator[World]:
        """Those with fewer slots than adapters; elsewhere nothing is ever swapped."""
        for num_slots in self.num_slots:
            for num_adapters in self.num_adapters:
                for zipf in ZIPF:
                    world = World(num_adapters, zipf, num_slots)
                    if world.num_slots * world.num_replicas < world.num_adapters:
                        yield world

    def waiting_worlds(self) -> Iterator[World]:
        """Short prompts and 500 adapters, at growing load."""
        for num_slots in self.num_slots:
            for zipf in ZIPF:
                for load in self.loads:
                    yield World(500, zipf, num_slots, load=load, prefill_s=0.05, decode_s=0.2)


async def run(grid: Grid, plan: Plan, notice: Notice) -> Report:
    """Simulates every cell of the grid `plan.num_repeats` times."""
    samples = Samples({OURS: [], LEAST: [], POOLED: []})
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(min(num_cores(), plan.num_repeats)) as pool:
        runs = [loop.run_in_executor(pool, _sample, grid, seed) for seed in range(plan.num_repeats)]
        for number, run_of_seed in enumerate(runs, 1):
            notice(f"seed {number}/{plan.num_repeats}")
            for side, sample in (await run_of_seed).items():
                samples.by_side[side].append(sample)
    title = "Adapters: swaps and waiting, 8 replicas, loads of 50 to 500 ms (simulated)"
    facts = {"requests a cell": grid.num_requests, "loaders a replica": 2}
    notes = [
        f"{POOLED}: one cache as large as all together. Its TTFT is own load and own prefill alone, as if nobody ever "
        "waited: where that is more than half of what least outstanding takes, no router can halve it.",
        f"load max/mean: of the work of {2 * grid.num_requests // 3} requests, whose sizes alone are worth 0.03.",
    ]
    return Report("adapters", title, samples, list(_ratios(grid, samples)), facts, notes)


def _sample(grid: Grid, seed: int) -> dict[str, Sample]:
    found: dict[str, dict[str, float]] = {OURS: {}, LEAST: {}, POOLED: {}}
    num_skipped = grid.num_requests // 3
    for world in grid.swap_worlds():
        requests = arrivals(world, grid.num_requests, seed)
        ours = Simulation(world, by_cost, seed).run(requests, num_skipped)
        found[OURS] |= {_swaps(world): ours.swap_rate, _balance(world): ours.imbalance}
        found[POOLED][_swaps(world)] = pooled_lru(world, requests, num_skipped)
    for world in grid.waiting_worlds():
        requests = arrivals(world, grid.num_requests // 2, seed)
        for side, choose in ((OURS, by_cost), (LEAST, least_outstanding)):
            outcome: Outcome = Simulation(world, choose, seed).run(requests, num_skipped // 2)
            found[side][_p99(world)] = outcome.ttft_p99_s
        found[POOLED][_p99(world)] = unqueued_p99_s(world, requests, num_skipped // 2, seed)
    return dict(found)


def _ratios(grid: Grid, samples: Samples) -> Iterator[Ratio]:
    for world in grid.swap_worlds():
        yield samples.ratio(_swaps(world), OURS, POOLED, Goal.at_most(1.05))
    for world in grid.swap_worlds():
        yield _balanced(samples, world)
    for world in grid.waiting_worlds():
        yield samples.ratio(_p99(world), OURS, LEAST, Goal.at_most(0.5))
        yield samples.ratio(_p99(world), POOLED, LEAST)


def _balanced(samples: Samples, world: World) -> Ratio:
    return Ratio(_balance(world), OURS, "the mean", samples.spread(OURS, _balance(world)), Goal.at_most(1.15))


def _cell(world: World) -> str:
    return f"{world.num_adapters} adapters, {world.num_slots} slots, Zipf {world.zipf}"


def _swaps(world: World) -> str:
    return f"swaps a request: {_cell(world)}"


def _balance(world: World) -> str:
    return f"load max/mean: {_cell(world)}"


def _p99(world: World) -> str:
    return f"TTFT p99 s: {_cell(world)}, load {world.load}"
