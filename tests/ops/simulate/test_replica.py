"""The event-skipping replica against the step-by-step one."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from ops.simulate.replica import ReplicaSpec, SimReplica
from ops.simulate.trace import Trace, TraceRequest
from ops.simulate.work import Progress, Work
from replicas.engine.order import OrderName
from tests.ops.simulate.making import conversations
from tests.ops.simulate.oracle import Job, Oracle

TOLERANCE_S = 1e-6
"""Both add the same step times in another order: far less than this apart. A step is 6 ms: one step more would show."""


def play(replica: SimReplica, requests: tuple[TraceRequest, ...]) -> dict[int, list[float]]:
    """First and end times by number, with every event in order."""
    times: dict[int, list[float]] = {}

    def take(progress: Progress) -> None:
        for work in progress.first:
            times[work.tag] = [progress.at]
        for work in progress.ended:
            times[work.tag].append(progress.at)
        replica.cache.check()

    for number, request in enumerate(requests):
        while replica.next_at < request.arrival_s:
            take(replica.advance())
        take(replica.submit(Work(request, number), request.arrival_s))
    while replica.next_at < float("inf"):
        take(replica.advance())
    return times


SPECS = {
    "ample": ReplicaSpec(kv_tokens=400_000, max_num_seqs=64, max_num_batched_tokens=256),
    "scarce memory": ReplicaSpec(kv_tokens=6_000, max_num_seqs=64, max_num_batched_tokens=256),
    "few places": ReplicaSpec(kv_tokens=100_000, max_num_seqs=3, max_num_batched_tokens=128),
    "tiny steps": ReplicaSpec(kv_tokens=20_000, max_num_seqs=16, max_num_batched_tokens=24),
}


def both(name: str, order: OrderName, per_s: float) -> list[tuple[list[float], Job]]:
    """First and end times as found by skipping, beside what stepping found, of every request."""
    trace = conversations(300, per_s, seed=len(name))
    spec = replace(SPECS[name], order=order)
    stepped = Oracle(spec, trace.block_tokens).play(list(trace.requests))
    times = play(SimReplica(spec, trace.block_tokens), trace.requests)
    assert len(times) == len(stepped) == 300
    return [(times[job.number], job) for job in stepped]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("per_s", [3.0, 14.0])
def test_skipping_from_event_to_event_agrees_with_stepping(name: str, per_s: float) -> None:
    for times, job in both(name, "fcfs", per_s):
        assert times == pytest.approx([job.first_s, job.end_s], abs=TOLERANCE_S), f"request {job.number}"


@pytest.mark.parametrize("name", ["ample", "scarce memory", "few places"])
@pytest.mark.parametrize("per_s", [3.0, 14.0])
def test_shortest_first_agrees_with_stepping(name: str, per_s: float) -> None:
    for times, job in both(name, "shortest", per_s):
        assert times == pytest.approx([job.first_s, job.end_s], abs=TOLERANCE_S), f"request {job.number}"


def test_prompts_that_become_short_while_another_takes_many_steps_move_when_it_is_done() -> None:
    """The one thing skipping sees late: what the prompt under way adds to the cache for those that wait."""
    pairs = both("tiny steps", "shortest", 14.0)
    skipped = sum(first - job.arrival_s for (first, _), job in pairs)
    stepped = sum(job.first_s - job.arrival_s for _, job in pairs if job.first_s is not None)
    assert skipped == pytest.approx(stepped, rel=0.01)


def test_scarce_memory_evicts_and_makes_requests_wait() -> None:
    trace = conversations(300, 14.0, seed=13)
    replica = SimReplica(SPECS["scarce memory"], trace.block_tokens)
    times = play(replica, trace.requests)
    ample = play(SimReplica(SPECS["ample"], trace.block_tokens), trace.requests)
    assert replica.cache.num_evicted > 100
    assert sum(first for first, _ in times.values()) > sum(first for first, _ in ample.values())


def test_what_is_pushed_is_the_state_at_the_end_of_the_last_step() -> None:
    """Looked at in between, a long prompt under way has lost just the tokens of the steps that have ended."""
    spec = ReplicaSpec(kv_tokens=100_000, max_num_batched_tokens=100)
    replica = SimReplica(spec, 16)
    step_s = spec.calibration.step_s(1, 100)
    replica.submit(Work(TraceRequest(0.0, 1050, 1), 0), 0.0)
    assert replica.frame(0.5 * step_s).stats(0.5 * step_s).num_waiting_tokens == 1050, "what came is told at once"
    stats = replica.frame(3.5 * step_s).stats(3.5 * step_s)
    assert (stats.num_steps, stats.num_waiting_tokens, stats.num_running) == (3, 750, 1)
    assert stats.waiting_sizes[-1] == (1, 750)
    replica.submit(Work(TraceRequest(0.0, 40, 1), 1), 3.6 * step_s)
    stats = replica.frame(3.9 * step_s).stats(3.9 * step_s)
    assert stats.num_waiting_tokens == 750 + 40, "the newcomer is told at once"
    stats = replica.frame(4.1 * step_s).stats(4.1 * step_s)
    assert (stats.num_waiting, stats.num_waiting_tokens) == (1, 650 + 40)


def test_frames_looked_at_late_or_never_change_nothing() -> None:
    trace = conversations(100, 8.0)
    spec = SPECS["ample"]
    looked = SimReplica(spec, trace.block_tokens)
    random = Random(0)
    times: dict[int, list[float]] = {}
    for number, request in enumerate(trace.requests):
        while looked.next_at < request.arrival_s:
            progress = looked.advance()
            for work in progress.first:
                times[work.tag] = [progress.at]
        looked.frame(request.arrival_s - random.random())
        looked.submit(Work(request, number), request.arrival_s)
    while looked.next_at < float("inf"):
        progress = looked.advance()
        for work in progress.first:
            times[work.tag] = [progress.at]
    unlooked = play(SimReplica(spec, trace.block_tokens), trace.requests)
    assert times == {number: first_end[:1] for number, first_end in unlooked.items()}


def test_waiting_sizes_add_up() -> None:
    trace = conversations(200, 30.0)
    replica = SimReplica(SPECS["few places"], trace.block_tokens)
    for number, request in enumerate(trace.requests):
        while replica.next_at < request.arrival_s:
            replica.advance()
            stats = replica.frame(replica.next_at).stats(request.arrival_s)
            assert sum(tokens for _, tokens in stats.waiting_sizes) == stats.num_waiting_tokens
            assert sum(num for num, _ in stats.waiting_sizes) >= stats.num_waiting
            assert all(num << i <= tokens < max(1, num) << i + 1 for i, (num, tokens) in enumerate(stats.waiting_sizes))
        replica.submit(Work(request, number), request.arrival_s)
    assert replica.num_open > 3


def test_a_trace_without_blocks_computes_every_prompt() -> None:
    trace = Trace("plain", 64, tuple(TraceRequest(float(i), 1000, 4) for i in range(5)))
    replica = SimReplica(ReplicaSpec(), 64)
    play(replica, trace.requests)
    assert replica.prefill_tokens == 5000
