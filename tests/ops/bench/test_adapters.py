"""The adapter model: what must hold in it by construction, and the figures that a short run can show."""

from __future__ import annotations

from random import Random

import pytest

from ops.bench.adapter_model import Simulation, World, arrivals, by_cost, least_outstanding, pooled_lru, unqueued_p99_s
from ops.bench.adapters import LEAST, OURS, Grid, run
from ops.bench.harness import Plan

CHOICES = (by_cost, least_outstanding)


def naive_lru_misses(adapters: list[int], capacity: int) -> int:
    """The slow obvious way: the distinct adapters asked for since the last time, counted anew for each request."""
    misses = 0
    for i, adapter in enumerate(adapters):
        since: set[int] = set()
        for earlier in reversed(adapters[:i]):
            if earlier == adapter:
                break
            since.add(earlier)
        else:
            misses += 1
            continue
        misses += len(since) >= capacity
    return misses


def test_the_pooled_cache_is_lru() -> None:
    world = World(40, 0.7, 2, num_replicas=4)
    requests = arrivals(world, 400, seed=3)
    assert pooled_lru(world, requests, 0) * 400 == naive_lru_misses([r.adapter for r in requests], 8)


def test_adapters_are_asked_for_by_their_rank_and_work_comes_at_the_load() -> None:
    world = World(100, 1.0, 8)
    requests = arrivals(world, 20_000, seed=1)
    harmonic = sum(1 / (i + 1) for i in range(100))
    for adapter in (0, 1, 9):
        share = sum(r.adapter == adapter for r in requests) / len(requests)
        assert share == pytest.approx(1 / (adapter + 1) / harmonic, rel=0.1)
    load = sum(r.prefill_s for r in requests) / requests[-1].at / world.num_replicas
    assert load == pytest.approx(world.load, rel=0.05)


def test_without_any_waiting_a_first_token_takes_its_own_load_and_its_own_prefill() -> None:
    world = World(40, 1.0, 2, num_replicas=4, prefill_s=0.05)
    requests = arrivals(world, 2_000, seed=3)
    floor_s = unqueued_p99_s(world, requests, 500, seed=3)
    assert 0.3 < floor_s < 0.5 + 0.3, "loads are 50 to 500 ms, one prefill in a hundred is 230 ms"
    assert all(floor_s <= Simulation(world, choose, 3).run(requests, 500).ttft_p99_s for choose in CHOICES)


@pytest.mark.parametrize("choose", CHOICES)
def test_every_request_gets_its_first_token_and_the_same_seed_gives_the_same_run(choose: object) -> None:
    assert callable(choose)
    world = World(60, 1.0, 4, num_replicas=3)
    requests = arrivals(world, 2_000, seed=2)
    runs = [Simulation(world, choose, seed=5) for _ in range(2)]
    outcomes = [simulation.run(requests, 500) for simulation in runs]
    assert outcomes[0] == outcomes[1]
    assert len(runs[0]._ttft) == 2_000 and min(runs[0]._ttft.values()) > 0
    for replica in runs[0].replicas:
        replica.slots.check()
        assert replica.num_open == 0 and not replica.waiters and replica.pending_s == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("world", [World(500, 1.0, 8), World(500, 0.8, 32)])
def test_homes_swap_no_more_than_one_pooled_cache_at_balanced_load(world: World) -> None:
    requests = arrivals(world, 12_000, seed=Random(7).randrange(100))
    ours = Simulation(world, by_cost).run(requests, 5_000)
    assert ours.swap_rate <= 1.05 * pooled_lru(world, requests, 5_000)
    assert ours.imbalance <= 1.25, "1.15, and what chance adds in so short a run"


def test_under_load_a_router_that_knows_adapters_halves_the_tail() -> None:
    world = World(500, 1.0, 8, load=0.8, prefill_s=0.05, decode_s=0.2)
    requests = arrivals(world, 12_000, seed=4)
    ours, least = (Simulation(world, choose).run(requests, 4_000) for choose in (by_cost, least_outstanding))
    assert ours.ttft_p99_s <= 0.5 * least.ttft_p99_s and ours.swap_rate < least.swap_rate


async def test_the_report_has_every_cell_with_its_goal() -> None:
    grid = Grid((100, 500), (8,), (0.5,), 600)
    report = await run(grid, Plan(2, 0), lambda words: None)
    assert report.num_repeats == 2 and len(report.ratios) == 2 * 6 + 2 * 3
    assert {str(ratio.goal) for ratio in report.ratios} == {"≤ 1.05", "≤ 1.15", "≤ 0.5", "None"}
    assert len(report.samples.metrics(OURS)) == 2 * 6 + 3 and len(report.samples.metrics(LEAST)) == 3
