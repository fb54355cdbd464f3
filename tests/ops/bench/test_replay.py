"""A trace as real requests: what shares a prefix there shares it here, and leaves when it should."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from ops.bench.replay import Outcome, replay, summary
from ops.bench.trace_slice import ReplayRequest, SliceSpec, slice_of, thinned
from ops.simulate.trace import Trace, TraceRequest

SPEC = SliceSpec(num_requests=10, num_replicas=2, load=0.5, kv_tokens=64_000, scale=8)


def trace(*requests: TraceRequest) -> Trace:
    return Trace("made up", 512, requests)


def common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_prompts_share_exactly_the_blocks_that_the_trace_says() -> None:
    made = trace(
        TraceRequest(0.0, 1500, 80, (1, 2, 3)),
        TraceRequest(1.0, 2048, 80, (1, 2, 4, 5)),
        TraceRequest(2.0, 700, 80, (9, 10)),
    )
    a, b, c = (request.prompt for request in slice_of(made, SPEC))
    assert [len(a), len(b), len(c)] == [187, 256, 87]
    assert 128 <= common(a, b) < 140, "two blocks of 64, and what two strangers' letters have in common by luck"
    assert common(a, c) < 12
    assert all(p.isascii() and p.islower() for p in (a, b, c))


def test_a_prompt_longer_than_its_blocks_is_its_own_beyond_them() -> None:
    made = trace(TraceRequest(0.0, 2000, 8, (1,)), TraceRequest(1.0, 2000, 8, (2,)), TraceRequest(2.0, 2000, 8, ()))
    prompts = [request.prompt for request in slice_of(made, SPEC)]
    assert [len(p) for p in prompts] == [250, 250, 250]
    assert len(set(prompts)) == 3


def test_lengths_times_and_targets_are_scaled_alike() -> None:
    made = trace(TraceRequest(0.0, 8000, 80, (1,)), TraceRequest(10.0, 16_000, 4, (2,), after=0, think_s=4.0))
    first, second = slice_of(made, SPEC)
    assert (first.at_s, first.max_tokens) == (0.0, 10)
    assert first.slo_s == pytest.approx(2 * 8000 / 8000 / 8)
    assert (second.after, second.think_s, second.max_tokens) == (0, 0.5, 1)
    arrivals = slice_of(trace(TraceRequest(0.0, 8000, 1, ()), TraceRequest(9.0, 8000, 1, ())), SPEC)
    assert arrivals[1].at_s == pytest.approx(16_000 / (2 * 8000 * 0.5) / 8), "load 0.5 of two replicas, 8 times as fast"


def test_a_slice_has_whole_conversations_from_all_of_the_trace() -> None:
    system = 7
    requests = [
        TraceRequest(100.0 * turn + name, 2048, 8, (system, *(1000 * name + block for block in range(turn + 1))))
        for turn in range(5)
        for name in range(1, 61)
    ]
    kept = thinned(trace(*requests), 40).requests
    names = {request.blocks[1] for request in kept}
    assert len(kept) == 5 * len(names) and 40 <= len(kept) < 45
    assert [r.arrival_s for r in kept] == sorted(r.arrival_s for r in kept)
    assert kept[0].arrival_s < 100 and kept[-1].arrival_s > 400


def test_turns_that_follow_one_another_stay_together() -> None:
    requests = [TraceRequest(float(i), 600, 8, (i,), after=i - 20 if i >= 20 else None) for i in range(100)]
    kept = thinned(trace(*requests), 10).requests
    assert len(kept) == 10
    assert [r.after for r in kept] == [None, None, *range(8)]
    assert all(kept[r.after].blocks[0] + 20 == r.blocks[0] for r in kept if r.after is not None)


def test_what_no_replica_could_hold_is_left_out() -> None:
    made = trace(TraceRequest(0.0, 100_000, 8, (1,)), TraceRequest(1.0, 1000, 8, (2,)))
    assert [len(r.prompt) for r in slice_of(made, SPEC)] == [125]


def asked(at_s: float, **more: object) -> ReplayRequest:
    return ReplayRequest(at_s, "prompt", 1, 0.1, **more)  # type: ignore[arg-type]


async def test_requests_leave_at_their_times_whatever_became_of_the_others() -> None:
    log: list[str] = []
    early: list[float] = []
    all_left = asyncio.Event()

    async def ask(index: int, request: ReplayRequest, intended: float) -> Outcome:
        early.append(intended - time.perf_counter())
        log.append(f"{index} left")
        if index == 2:
            all_left.set()
        await all_left.wait()
        log.append(f"{index} ended")
        return Outcome(0.2, 6, 0)

    await replay([asked(0.0), asked(0.02), asked(0.04)], ask)
    assert log[:3] == ["0 left", "1 left", "2 left"]
    assert max(early) < 0.002


async def test_a_turn_leaves_after_the_answer_before_it_and_a_pause() -> None:
    ended: list[float] = []
    waited: list[float] = []

    async def ask(index: int, request: ReplayRequest, intended: float) -> Outcome:
        waited.extend(time.perf_counter() - at for at in ended)
        assert not ended or intended - ended[0] == pytest.approx(0.05, abs=0.04)
        await asyncio.sleep(0.02)
        ended.append(time.perf_counter())
        return Outcome(0.1, 6, 0)

    await replay([asked(0.0), asked(0.0, after=0, think_s=0.05)], ask)
    assert len(waited) == 1 and waited[0] >= 0.048


def test_a_request_without_an_answer_is_late() -> None:
    outcomes = [Outcome(0.05, 100, 60), Outcome(0.2, 100, 0), Outcome(math.inf, 100, 0)]
    found = summary(outcomes, [asked(0.0)] * 3, scale=8)
    assert found["in time %"] == pytest.approx(100 / 3)
    assert found["prompt tokens cached %"] == pytest.approx(30)
    assert found["TTFT mean s"] == pytest.approx(8 * 0.125)
    assert (found["TTFT p50 s"], found["TTFT p99 s"], found["failed"]) == (1.6, math.inf, 1.0)
