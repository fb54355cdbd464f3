"""Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018) of the prompt's beginning.

As KubeAI (0.2x, `internal/loadbalancer/balance_chwbl.go`, strategy `PrefixHash`) does it: every replica has 256 points
on a ring; the first replica clockwise from the key's hash that would have at most 1.25 times the mean load takes the
request; when nobody would (few requests in all), the first does. A load is the number of requests in flight.
Published defaults: `meanLoadFactor` 125 %, `replication` 256, `prefixCharLength` 100.

KubeAI hashes the first 100 characters of the first user message. Block hashes cover the whole rendered prompt, system
message included, and only full blocks: here the key is the last full block within the first `prefix_tokens`, 1,024 by
default, which reaches past a system prompt of usual length. With 100 characters every prompt with a common system
message would have one key.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache

from xxhash import xxh3_64_intdigest, xxh64_intdigest

from routing.baselines.rule import Choice, outstanding, policy
from routing.policy import Policy
from routing.types import ReplicaState, RouteRequest, Snapshot


def chwbl(
    name: str = "chwbl", *, load_factor: float = 1.25, num_points: int = 256, prefix_tokens: int = 1024
) -> Policy:
    """`load_factor`: times the mean load a replica may have; `num_points`: its places on the ring."""
    ring_of = lru_cache(maxsize=64)(lambda replica_ids: _ring(replica_ids, num_points))

    def pick(request: RouteRequest, snapshot: Snapshot, fit: Sequence[ReplicaState]) -> Choice:
        points, owners = ring_of(tuple([r.replica_id for r in fit]))
        start = bisect_left(points, _key(request, prefix_tokens)) % len(points)
        loads = [outstanding(replica) for replica in fit]
        bound = load_factor * (sum(loads) + 1) / len(fit)
        if min(loads) + 1 > bound:
            return fit[owners[start]], "its prefix's place, all being overloaded"
        passed: set[int] = set()
        while loads[owner := owners[start]] + 1 > bound:
            passed.add(owner)
            start = (start + 1) % len(owners)
        return fit[owner], f"passed {len(passed)} overloaded on the ring" if passed else "its prefix's place"

    return policy(name, pick)


def _ring(replica_ids: Sequence[str], num_points: int) -> tuple[list[int], list[int]]:
    """Sorted points, and for each the index of the replica it belongs to."""
    placed = sorted(
        (xxh64_intdigest(f"{replica_id}{point}".encode()), index)
        for index, replica_id in enumerate(replica_ids)
        for point in range(num_points)
    )
    return [point for point, _ in placed], [index for _, index in placed]


def _key(request: RouteRequest, prefix_tokens: int) -> int:
    hashes = request.block_hashes[: max(1, prefix_tokens // request.block_tokens)]
    return hashes[-1] if hashes else xxh3_64_intdigest(request.request_id.encode())
