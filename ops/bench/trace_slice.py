"""A slice of a trace as real requests: prompts that share what the trace's prompts share, sent when they were.

Everything is made `scale` times smaller (prompt, answer, arrival gaps, pauses, KV cache) at unchanged replica speed,
which is the same as `scale` times as fast, so that minutes of trace take seconds.
A token is a character: `sim:bytes` and the mock upstream count bytes.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from random import Random

import msgspec

from ops.simulate.slo import Slo
from ops.simulate.trace import Trace, TraceRequest, scramble

PREFILL_TOKENS_PER_S = 8000.0
STEP_BASE_S = 0.006
STEP_PER_SEQUENCE_S = 0.00035
MAX_NUM_SEQS = 256
STEP_TOKENS = 2048
"""Prompt tokens, of the trace's, that go into one step."""

BLOCK_SIZE = 16

COMMON_SHARE = 0.02
"""A block in more of the requests than this belongs to no conversation: a system prompt, say."""


class SliceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a trace is played. `load` 1.0 would keep all replicas busy with prefill if nothing were cached; `kv_tokens`
    of each replica in trace tokens."""

    num_requests: int = 400
    num_replicas: int = 4
    load: float = 0.5
    kv_tokens: int = 512_000
    scale: int = 8

    @property
    def num_blocks(self) -> int:
        """KV blocks of a scaled replica."""
        return self.kv_tokens // self.scale // BLOCK_SIZE

    @property
    def max_num_batched_tokens(self) -> int:
        """Tokens of a scaled replica's step."""
        return max(BLOCK_SIZE, STEP_TOKENS // self.scale)


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


def scaled(trace: Trace, spec: SliceSpec) -> Trace:
    """Conversations of the trace that fit a replica, in real seconds and tokens of the scaled replicas.

    Requests come as they are to leave; equal block = equal text.
    """
    fitting = thinned(trace.only_fitting(spec.kv_tokens - trace.block_tokens), spec.num_requests)
    arrivals = fitting.arrivals(spec.load, spec.num_replicas * PREFILL_TOKENS_PER_S)
    pairs = zip(arrivals, fitting.requests, strict=True)
    return Trace(trace.name, block_tokens(trace, spec), tuple(_scaled(r, at_s, spec.scale) for at_s, r in pairs))


def _scaled(request: TraceRequest, at_s: float, scale: int) -> TraceRequest:
    return replace(
        request,
        arrival_s=at_s / scale,
        num_prompt=max(2, request.num_prompt // scale),
        num_output=max(1, request.num_output // scale),
        think_s=request.think_s / scale,
    )


def slice_of(trace: Trace, spec: SliceSpec) -> list[ReplayRequest]:
    """The requests of `scaled`, with the text of their prompts and what counts as in time."""
    slo = Slo()
    small = scaled(trace, spec)
    return [
        ReplayRequest(
            at_s=request.arrival_s,
            prompt=_prompt(request.blocks, small.block_tokens, request.num_prompt),
            max_tokens=request.num_output,
            slo_s=max(slo.floor_s / spec.scale, slo.factor * request.num_prompt / PREFILL_TOKENS_PER_S),
            after=request.after,
            think_s=request.think_s,
        )
        for request in small.requests
    ]


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
