"""The search for a capacity: given up early or not, from whatever guess, it ends at the same rung."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.simulate.capacity import MAX_LOAD, MIN_LOAD, Search, capacity
from ops.simulate.driver import run, run_while_sustained
from ops.simulate.fleet import FleetSpec
from ops.simulate.replica import ReplicaSpec
from ops.simulate.result import Outcome
from ops.simulate.slo import Hopes, Slo
from ops.simulate.trace import Trace
from tests.ops.simulate.making import conversations, sessions, unique_prompts

REPLICA = ReplicaSpec(kv_tokens=20_000, max_num_batched_tokens=256)
FLEET = FleetSpec(num_replicas=2, replica=REPLICA, slo=Slo(floor_s=0.05))
TRACES = (conversations(150, 20.0), sessions(num=12, num_turns=4, think_s=1.0))


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name)
@pytest.mark.parametrize("policy", ["warm", "least_outstanding"])
def test_a_run_that_stops_early_is_one_that_is_not_sustained(trace: Trace, policy: str) -> None:
    stopped = 0
    for load in (0.2, 0.5, 0.8, 1.2, 2.0, 4.0, 9.0):
        whole = run(trace, policy, FLEET, load)
        early = run_while_sustained(trace, policy, FLEET, load)
        if whole.sustained:
            assert early is not None and (early.ttfts_s, early.summary) == (whole.ttfts_s, whole.summary)
        else:
            assert early is None
            stopped += 1
    assert 0 < stopped < 7


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name)
@pytest.mark.parametrize("order", ["fcfs", "shortest"])
def test_a_capacity_is_the_same_without_stopping_early(trace: Trace, order: str) -> None:
    fleet = replace(FLEET, replica=replace(REPLICA, order=order))
    whole = capacity(trace, "warm", fleet, Search(tolerance=0.05, attempt=run))
    early = capacity(trace, "warm", fleet, Search(tolerance=0.05, attempt=run_while_sustained))
    assert early.load == whole.load > 0
    assert early.result.summary == whole.result.summary
    assert set(early.curve) < set(whole.curve), "hopeless loads have no attainment when they are given up"


LINE = unique_prompts([float(i) for i in range(400)], 1600)
EVEN = FleetSpec(2, ReplicaSpec(max_num_batched_tokens=1600), slo=Slo(floor_s=0.3, factor=1.1))


@pytest.mark.parametrize("near", [None, 0.2, 0.9, 0.97, 5.0, 1e-5, 1e5])
def test_the_guess_does_not_change_what_is_found(near: float | None) -> None:
    expected = capacity(LINE, "round_robin", EVEN, Search(tolerance=0.02))
    found = capacity(LINE, "round_robin", EVEN, Search(tolerance=0.02, near=near))
    assert found.load == expected.load
    if near == 0.97:
        assert len(found.curve) < len(expected.curve)


@pytest.mark.parametrize("slo", [Slo(floor_s=1e6), Slo(floor_s=1e-6, factor=0.0)])
def test_a_search_ends_at_the_ends_of_the_ladder(slo: Slo) -> None:
    found = capacity(unique_prompts([0.0, 1.0, 2.0], 300), "round_robin", replace(EVEN, slo=slo))
    if slo.floor_s > 1:
        assert found.load == pytest.approx(MAX_LOAD, rel=0.01) and found.result.sustained
    else:
        assert found.load == 0.0 and found.result.load == pytest.approx(MIN_LOAD, rel=0.01)


requests = st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 4)), min_size=1, max_size=30)


@settings(max_examples=60)
@given(requests, st.floats(0.1, 2.0), st.floats(0.5, 0.99))
def test_misses_are_counted_when_they_are_certain_and_none_too_many(
    sent: list[tuple[float, float]], target_s: float, attainment: float
) -> None:
    """Against the count at the end; a clock that ticks ten times a second."""
    sent.sort()
    outcomes = [Outcome() for _ in sent]
    hopes = Hopes(Slo(attainment=attainment), [target_s] * len(sent), outcomes)
    todo = list(enumerate(sent))
    late = sum(at + ttft - at > target_s for at, ttft in sent)
    for tick in range(120):
        now = tick / 10
        while todo and todo[0][1][0] <= now:
            index, (at, _) = todo.pop(0)
            outcomes[index].arrival_s = at
            hopes.arrived(index, at)
        for outcome, (at, ttft) in zip(outcomes, sent, strict=True):
            if at + ttft <= now:
                outcome.first_s = at + ttft
        hopes.look(now)
        assert hopes.num_missed <= late
    assert hopes.num_missed == late
    assert hopes.any == ((len(sent) - late) / len(sent) >= attainment)
