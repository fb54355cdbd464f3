"""The cache-aware rule of SGLang's router and its descendant vllm-router (0.1.17, `src/policies/cache_aware.rs`).

1. Imbalanced (most minus fewest requests > `abs_threshold`, and most > `rel_threshold` x fewest): fewest requests.
2. Else the replica that was sent the longest common prefix, when that is more than `cache_threshold` of the prompt.
3. Else fewest requests (SGLang until 2025: the smallest tree; both programs have since moved to the load).

They keep a tree of the characters sent to each worker, trimmed to `max_tree_size` characters a worker, and never hear
from the worker's cache: here that is a mirror (`PolicySpec.reads`), in blocks of tokens instead of characters, four
characters taken for a token. Of several workers that were sent the longest prefix the tree names whichever its hash map
has first (measured: luck), and blocks are coarser than letters besides: the draw decides. Loads are requests in flight;
the first of equals wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from routing.baselines.rule import Choice, drawn, outstanding, policy
from routing.policy import Policy
from routing.types import ReplicaState, RouteRequest, Snapshot

CHARS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The rule's parameters, by the programs' names (`--cache-threshold`, `--balance-abs-threshold` …)."""

    cache_threshold: float
    abs_threshold: int
    rel_threshold: float
    max_tree_chars: int

    @property
    def mirror_tokens(self) -> int:
        """The tree's bound in tokens."""
        return self.max_tree_chars // CHARS_PER_TOKEN


VLLM_ROUTER = Thresholds(cache_threshold=0.3, abs_threshold=64, rel_threshold=1.5, max_tree_chars=2**25)
"""Defaults of the programs `vllm-router` 0.1.17 and `sglang_router` since 0.2 (whose tree may have 2**26)."""

SGLANG = Thresholds(cache_threshold=0.5, abs_threshold=32, rel_threshold=1.0001, max_tree_chars=2**24)
"""Defaults SGLang's router was published with (0.1, December 2024), still those of other ports."""


def cache_aware(name: str, thresholds: Thresholds) -> Policy:
    """The rule with one set of thresholds."""

    def pick(request: RouteRequest, snapshot: Snapshot, fit: Sequence[ReplicaState]) -> Choice:
        loads = [outstanding(replica) for replica in fit]
        fewest, most = min(loads), max(loads)
        idlest = fit[loads.index(fewest)]
        if most - fewest > thresholds.abs_threshold and most > thresholds.rel_threshold * fewest:
            return idlest, "imbalanced: fewest requests"
        matched = snapshot.matched_blocks
        longest = max(matched.get(replica.replica_id, 0) for replica in fit)
        if longest * request.block_tokens > thresholds.cache_threshold * request.num_prompt_tokens:
            warmest = [replica for replica in fit if matched.get(replica.replica_id) == longest]
            return drawn(warmest, snapshot.draw), "was sent the longest prefix"
        return idlest, "no prefix to speak of: fewest requests"

    return policy(name, pick)
