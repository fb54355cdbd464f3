"""A slice of a trace as real requests: prompts that share what the trace's prompts share, sent when they were.

Everything is made `scale` times smaller (prompt, answer, arrival gaps, pauses, KV cache) at unchanged replica speed,
which is the same as `scale` times as fast, so that minutes of trace take seconds. Results are in trace seconds again.
A token is a character: `sim:bytes` and the mock upstream count bytes.
"""

from __future__ import annotations

import asyncio
import math
import string
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import TypeAlias

import msgspec

from ops.bench.harness import Sample
from ops.bench.load_spec import Quantiles
from ops.simulate.slo import Slo
from ops.simulate.trace import Trace, scramble

PREFILL_TOKENS_PER_S = 8000.0
STEP_BASE_S = 0.006
STEP_PER_SEQUENCE_S = 0.00035
MAX_NUM_SEQS = 256
MAX_BATCHED_TOKENS = 256
"""Replica speed, and the share of a prompt that goes into one step: 2,048 trace tokens at the usual scale of 8."""

BLOCK_SIZE = 16

COMMON_SHARE = 0.02
"""A block in more of the requests than this belongs to no conversation: a system prompt, say."""


class SliceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a trace is played. `load` 1.0 would keep all replicas busy with prefill if nothing were cached; `kv_tokens`
    of each replica in trace tokens."""

    num_requests: int = 400
    num_replicas: int = 4
    load: float = 0.6
    kv_tokens: int = 512_000
    scale: int = 8

    @property
    def num_blocks(self) -> int:
        """KV blocks of a scaled replica."""
        return self.kv_tokens // self.scale // BLOCK_SIZE


class ReplayRequest(msgspec.Struct, frozen=True):
    """One request to send `at_s` seconds after the start, or `think_s` after the answer of request `after`.

    `slo_s`: its first token must come within. All in real seconds.
    """

    at_s: float
    prompt: str
    max_tokens: int
    slo_s: float
    after: int | None = None
    think_s: float = 0.0


class Outcome(msgspec.Struct, frozen=True):
    """What came of a request; `ttft_s` counts from when it was meant to leave, inf for one without an answer."""

    ttft_s: float
    num_prompt: int
    num_cached: int


def block_tokens(trace: Trace, spec: SliceSpec) -> int:
    """Tokens of a scaled block."""
    return max(1, trace.block_tokens // spec.scale)


def thinned(trace: Trace, num_requests: int) -> Trace:
    """Whole conversations drawn from all of the trace, of so many requests together or a few more.

    The first requests alone would hit little: what they begin is continued later. A conversation is what begins with
    the same block, common beginnings aside; or what follows from one request.
    """
    counts = Counter(block for request in trace.requests for block in request.blocks)
    common = {block for block, count in counts.items() if count > COMMON_SHARE * len(trace.requests)}
    keys: list[int] = []
    for index, request in enumerate(trace.requests):
        own = next((block for block in request.blocks if block not in common), scramble(index))
        keys.append(own if request.after is None else keys[request.after])
    sizes = Counter(keys)
    chosen: set[int] = set()
    for key in sorted(sizes, key=scramble):
        if num_requests <= 0:
            break
        chosen.add(key)
        num_requests -= sizes[key]
    kept = [index for index, key in enumerate(keys) if key in chosen]
    place = {index: i for i, index in enumerate(kept)}
    requests = [trace.requests[index] for index in kept]
    followed = [r if r.after is None else replace(r, after=place[r.after]) for r in requests]
    return replace(trace, requests=tuple(followed))


def slice_of(trace: Trace, spec: SliceSpec) -> list[ReplayRequest]:
    """Conversations of the trace that fit a replica, scaled."""
    fitting = thinned(trace.only_fitting(spec.kv_tokens - trace.block_tokens), spec.num_requests)
    size = block_tokens(trace, spec)
    arrivals = fitting.arrivals(spec.load, spec.num_replicas * PREFILL_TOKENS_PER_S)
    slo = Slo()
    found = []
    for at_s, request in zip(arrivals, fitting.requests, strict=True):
        num_prompt = max(2, request.num_prompt // spec.scale)
        slo_s = max(slo.floor_s, slo.factor * request.num_prompt / PREFILL_TOKENS_PER_S) / spec.scale
        found.append(
            ReplayRequest(
                at_s=at_s / spec.scale,
                prompt=_prompt(request.blocks, size, num_prompt),
                max_tokens=max(1, request.num_output // spec.scale),
                slo_s=slo_s,
                after=request.after,
                think_s=request.think_s / spec.scale,
            )
        )
    return found


def _prompt(blocks: Sequence[int], size: int, num_tokens: int) -> str:
    """Text of that many characters: each block's own, cut at the end. What no block covers is the last block's."""
    text = "".join(_text(block, size) for block in blocks)
    if len(text) < num_tokens:
        text += _text(blocks[-1] if blocks else num_tokens, 0x10000)[: num_tokens - len(text)]
    return text[:num_tokens]


@lru_cache(maxsize=65536)
def _text(block: int, size: int) -> str:
    """The same `size` letters for the same block every time."""
    return "".join(Random(block).choices(string.ascii_lowercase, k=size))


Ask: TypeAlias = Callable[[int, ReplayRequest, float], Awaitable[Outcome]]
"""(index, request, when it is meant to leave on `time.perf_counter`) → its outcome, when its answer has ended."""


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
            return await self.ask(index, request, intended)
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
    late = math.inf
    ttft = Quantiles.of([scale * o.ttft_s for o in outcomes])
    num_in_time = sum(o.ttft_s <= r.slo_s for o, r in zip(outcomes, requests, strict=True))
    return {
        "TTFT mean s": scale * sum(o.ttft_s for o in answered) / max(1, len(answered)),
        "TTFT p50 s": late if ttft.p50 is None else ttft.p50,
        "TTFT p90 s": late if ttft.p90 is None else ttft.p90,
        "TTFT p99 s": late if ttft.p99 is None else ttft.p99,
        "in time %": 100 * num_in_time / len(outcomes),
        "prompt tokens cached %": 100 * sum(o.num_cached for o in answered) / max(1, num_prompt),
        "failed": float(len(outcomes) - len(answered)),
    }
