"""Traces made of others: with adapters, with tenants, longer. Deterministic by seed."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, replace
from itertools import accumulate
from random import Random

from ops.simulate.trace import Trace, TraceRequest, scramble

COMMON = 0.1
"""A block that is in more than this part of all prompts says nothing about who asks."""


@dataclass(frozen=True, slots=True)
class AdapterMix:
    """`num_adapters` LoRA adapters: the k-th most used is asked for in proportion to 1 / k^`zipf`.

    Each has one of `ranks`, drawn once; how long it loads grows with it.
    """

    num_adapters: int
    zipf: float = 1.0
    ranks: tuple[int, ...] = (8,)
    seed: int = 0


def with_adapters(trace: Trace, mix: AdapterMix) -> Trace:
    """Every conversation draws an adapter; its prompts share nothing with those under another one.

    Requests of one session are one conversation, and so are those that share the first block that is not common to
    many (as a system prompt is).
    """
    random = Random(mix.seed)
    weights = list(accumulate(1 / k**mix.zipf for k in range(1, mix.num_adapters + 1)))
    ranks = [random.choice(mix.ranks) for _ in range(mix.num_adapters)]
    by_root: dict[int, int] = {}
    common = _common_blocks(trace)
    drawn: list[int] = []
    requests = []
    for request in trace.requests:
        root = next((block for block in request.blocks if block not in common), None)
        if request.after is not None:
            number = drawn[request.after]
        elif root is not None and root in by_root:
            number = by_root[root]
        else:
            number = bisect_left(weights, random.random() * weights[-1])
        if root is not None:
            by_root.setdefault(root, number)
        drawn.append(number)
        requests.append(_under(request, number, ranks[number]))
    note = f"{mix.num_adapters} adapters, Zipf {mix.zipf:g}"
    return replace(trace, requests=tuple(requests), notes=(*trace.notes, note))


def _common_blocks(trace: Trace) -> set[int]:
    """Blocks that more than `COMMON` of all prompts have."""
    counts = Counter(block for request in trace.requests for block in request.blocks)
    return {block for block, num in counts.items() if num > COMMON * len(trace.requests)}


def _under(request: TraceRequest, number: int, rank: int) -> TraceRequest:
    root = scramble(number + 1)
    blocks = tuple([block ^ root for block in request.blocks])
    return replace(request, adapter=f"adapter-{number}@1", adapter_rank=rank, blocks=blocks)


def with_tenants(trace: Trace, num_tenants: int, zipf: float = 1.0, seed: int = 0) -> Trace:
    """Every conversation belongs to one of `num_tenants`, drawn like adapters; prefixes stay as they are."""
    mixed = with_adapters(trace, AdapterMix(num_tenants, zipf, seed=seed))
    requests = tuple(
        replace(request, tenant=f"tenant-{str(with_adapter.adapter).removeprefix('adapter-').removesuffix('@1')}")
        for request, with_adapter in zip(trace.requests, mixed.requests, strict=True)
    )
    return replace(trace, requests=requests, notes=(*trace.notes, f"{num_tenants} tenants, Zipf {zipf:g}"))


def repeated(trace: Trace, times: int) -> Trace:
    """The trace `times` in a row, each time with other prompts, for fleets that would be through with it too soon."""
    span_s = trace.duration_s * (1 + 1 / max(1, len(trace.requests)))
    requests: list[TraceRequest] = []
    for turn in range(times):
        root = scramble(turn) if turn else 0
        first = len(requests)
        for request in trace.requests:
            requests.append(
                replace(
                    request,
                    arrival_s=request.arrival_s + turn * span_s,
                    blocks=tuple([block ^ root for block in request.blocks]),
                    after=None if request.after is None else first + request.after,
                )
            )
    return replace(trace, requests=tuple(requests), notes=(*trace.notes, f"{times} times in a row, prompts anew"))
