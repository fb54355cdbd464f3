"""Sending the requests of a slice, each at its time, and summing up what came of them in trace seconds."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from ops.bench.harness import Sample
from ops.bench.trace_slice import ReplayRequest


class Outcome(msgspec.Struct, frozen=True):
    """What came of a request; `ttft_s` counts from when it was meant to leave, inf for one without an answer.

    `replica` is whoever answered, as the front-end names it. `left_s` and `ended_s`, in seconds after the start of the
    replay, are noted by `replay`.
    """

    ttft_s: float
    num_prompt: int
    num_cached: int
    replica: str = ""
    left_s: float = 0.0
    ended_s: float = math.inf


Ask: TypeAlias = Callable[[int, ReplayRequest, float], Awaitable[Outcome]]
"""(index, request, when it is meant to leave on `time.perf_counter`) → its outcome, when its answer has ended."""


Play: TypeAlias = Callable[[Sequence[ReplayRequest]], Awaitable[list[Outcome]]]
"""Sends requests through a front-end that runs, each at its time."""


@dataclass(slots=True)
class _Replay:
    requests: Sequence[ReplayRequest]
    ask: Ask
    start: float
    done: list[asyncio.Event]

    async def one(self, index: int) -> Outcome:
        request = self.requests[index]
        intended = self.start + request.at_s
        if request.after is not None:
            await self.done[request.after].wait()
            intended = time.perf_counter() + request.think_s
        await asyncio.sleep(max(0.0, intended - time.perf_counter()))
        try:
            outcome = await self.ask(index, request, intended)
            ended_s = time.perf_counter() - self.start
            return msgspec.structs.replace(outcome, left_s=intended - self.start, ended_s=ended_s)
        finally:
            self.done[index].set()


async def replay(requests: Sequence[ReplayRequest], ask: Ask) -> list[Outcome]:
    """Sends them all, each at its time whatever became of the others; returns when the last has ended."""
    run = _Replay(requests, ask, time.perf_counter(), [asyncio.Event() for _ in requests])
    return list(await asyncio.gather(*(run.one(index) for index in range(len(requests)))))


def summary(outcomes: Sequence[Outcome], requests: Sequence[ReplayRequest], scale: int) -> Sample:
    """The figures of one replay, in trace seconds; requests without an answer are late and compute nothing."""
    answered = [o for o in outcomes if math.isfinite(o.ttft_s)]
    num_prompt = sum(o.num_prompt for o in answered)
    ranked = sorted(scale * o.ttft_s for o in outcomes)
    quantiles = {f"TTFT p{q} s": ranked[max(0, math.ceil(q * len(ranked) / 100) - 1)] for q in (50, 90, 95, 99)}
    num_in_time = sum(o.ttft_s <= r.slo_s for o, r in zip(outcomes, requests, strict=True))
    return {
        "TTFT mean s": scale * sum(o.ttft_s for o in answered) / max(1, len(answered)),
        **quantiles,
        "in time %": 100 * num_in_time / len(outcomes),
        "prompt tokens cached %": 100 * sum(o.num_cached for o in answered) / max(1, num_prompt),
        "failed": float(len(outcomes) - len(answered)),
    }
