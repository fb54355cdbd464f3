"""The cost of NVIDIA Dynamo's KV router (1.x, `lib/kv-router/src/scheduling/selector`), from exact KV events.

    cost = overlap_weight x (prefill tokens waiting there + uncached tokens of ours) / block + blocks in use with ours

The lowest cost wins, equals by chance; with a temperature a softmax over the costs, scaled to their range, is drawn
from. Published defaults: `overlap_weight` 1 (0.x: `--kv-overlap-score-weight`; 1.x splits it into a credit of 1 and a
scale of 1, the same at the defaults), `--router-temperature` 0, no weight on the number of requests.

Dynamo counts the distinct blocks of the requests it has placed; here the blocks in use are those the replica reports
plus the prompts on their way, and all of our own prompt's, in routing blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from routing.baselines.rule import Choice, drawn, policy
from routing.cost import matched_tokens
from routing.policy import Policy
from routing.types import ReplicaState, RouteRequest, Snapshot


def overlap_cost(name: str, *, overlap_weight: float = 1.0, temperature: float = 0.0) -> Policy:
    """The rule; `temperature` 0 takes the lowest cost."""

    def pick(request: RouteRequest, snapshot: Snapshot, fit: Sequence[ReplicaState]) -> Choice:
        costs = [_cost(request, snapshot, replica, overlap_weight) for replica in fit]
        if temperature:
            return _sampled(fit, costs, (temperature, snapshot.draw)), f"drawn at temperature {temperature:g}"
        lowest = min(costs)
        best = [r for r, cost in zip(fit, costs, strict=True) if cost == lowest]
        return drawn(best, snapshot.draw), f"lowest of {len(fit)} costs: {lowest:.1f} blocks"

    return policy(name, pick)


def _cost(request: RouteRequest, snapshot: Snapshot, replica: ReplicaState, overlap_weight: float) -> float:
    """In routing blocks."""
    matched = matched_tokens(request, snapshot.matched_blocks.get(replica.replica_id, 0))
    prefill = replica.num_waiting_tokens + replica.num_sent_tokens + request.num_prompt_tokens - matched
    in_use = (replica.num_blocks - replica.num_free_blocks) * replica.block_size + replica.num_sent_tokens
    return (overlap_weight * prefill + in_use + request.num_prompt_tokens) / request.block_tokens


def _sampled(fit: Sequence[ReplicaState], costs: Sequence[float], chance: tuple[float, float]) -> ReplicaState:
    """By softmax of the negated costs over (their range x temperature). `chance` = (temperature, draw)."""
    temperature, draw = chance
    lowest, spread = min(costs), max(costs) - min(costs)
    if not spread:
        return drawn(fit, draw)
    sums = list(accumulate(math.exp((lowest - cost) / (spread * temperature)) for cost in costs))
    return next(r for r, upto in zip(fit, sums, strict=True) if draw * sums[-1] < upto)
