"""What no router can beat: an infinite cache, and one LRU cache as large as all replicas' together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from ops.simulate.trace import TraceRequest


def infinite_cache_hit(requests: Sequence[TraceRequest], block_tokens: int) -> float:
    """The part of all prompt tokens that requests before them had computed, were nothing ever evicted."""
    seen: set[int] = set()
    num_hit = 0
    for request in requests:
        num = 0
        for block in request.blocks:
            if block not in seen:
                break
            num += 1
        num_hit += min(num * block_tokens, request.num_prompt - 1)
        seen.update(request.blocks[num:])
    return num_hit / sum(r.num_prompt for r in requests)


def pooled_lru_hit(requests: Sequence[TraceRequest], block_tokens: int, kv_tokens: int) -> float:
    """The same with room for `kv_tokens` in all, least recently used evicted first, a prompt's tail before its head.

    Requests come one after another and answers take no room, so fleets stay below it (but LRU is not always best).
    """
    capacity = kv_tokens // block_tokens
    cached: dict[int, None] = {}
    num_hit = 0
    for request in requests:
        num = 0
        for block in request.blocks:
            if block not in cached:
                break
            num += 1
        num_hit += min(num * block_tokens, request.num_prompt - 1)
        for block in reversed(request.blocks):
            cached.pop(block, None)
            cached[block] = None
        for block in list(islice(cached, max(0, len(cached) - capacity))):
            del cached[block]
    return num_hit / sum(r.num_prompt for r in requests)


def pooled_lru_swap_rate(requests: Iterable[TraceRequest], num_slots: int) -> float:
    """Adapter loads per request that wants one, with `num_slots` in all, least recently used evicted first."""
    return lru_misses((r.adapter for r in requests if r.adapter is not None), num_slots)


def lru_misses(keys: Iterable[str], capacity: int) -> float:
    """The part of the keys that an LRU of this capacity does not hold when they come."""
    held: dict[str, None] = {}
    num = num_missed = 0
    for key in keys:
        num += 1
        if key in held:
            del held[key]
        else:
            num_missed += 1
            if len(held) >= capacity:
                del held[next(iter(held))]
        held[key] = None
    return num_missed / num if num else 0.0
