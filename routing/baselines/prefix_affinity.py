"""The rule of Ray Serve LLM's `PrefixCacheAffinityRouter` (Ray 2.60, `llm/_internal/serve/routing_policies`).

1. Imbalanced (longest minus shortest queue > `imbalanced_threshold`): power of two choices.
2. Else among the replicas that were sent the longest common prefix, the one with the shortest queue, when that prefix
   is at least `match_rate_threshold` of the prompt.
3. Else among the replicas that were sent the least so far, the one with the shortest queue.

Published defaults: no imbalance ever (infinity; 10 in Ray 2.49 to 2.53), 0.1, and a tree of characters that never
evicts (`do_eviction` False). Here the tree is a mirror without bound, in blocks of tokens instead of characters: where
blocks cannot tell whose common prefix is the longest, the draw decides (`routing.baselines.rule.goes_on`).
"""

from __future__ import annotations

from collections.abc import Sequence

from routing.baselines.rule import Choice, drawn, goes_on, least, outstanding, policy, two_choices
from routing.policy import Policy
from routing.types import ReplicaState, RouteRequest, Snapshot


def prefix_affinity(
    name: str, *, imbalanced_threshold: float = float("inf"), match_rate_threshold: float = 0.1
) -> Policy:
    """The rule; `imbalanced_threshold` in requests, `match_rate_threshold` a fraction of the prompt."""

    def pick(request: RouteRequest, snapshot: Snapshot, fit: Sequence[ReplicaState]) -> Choice:
        loads = [outstanding(replica) for replica in fit]
        if max(loads) - min(loads) > imbalanced_threshold:
            return two_choices(fit, snapshot.draw), "imbalanced: fewer requests of two drawn"
        matched = [snapshot.matched_blocks.get(replica.replica_id, 0) for replica in fit]
        longest = max(matched)
        if longest * request.block_tokens < match_rate_threshold * request.num_prompt_tokens:
            held = [snapshot.held_blocks.get(replica.replica_id, 0) for replica in fit]
            smallest = [r for r, num_blocks in zip(fit, held, strict=True) if num_blocks == min(held)]
            return least(smallest, snapshot.draw), "no prefix to speak of: was sent the least so far"
        warmest = [r for r, num_blocks in zip(fit, matched, strict=True) if num_blocks == longest]
        choose = drawn if goes_on(request, longest) else least
        return choose(warmest, snapshot.draw), "was sent the longest prefix"

    return policy(name, pick)
