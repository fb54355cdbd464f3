"""What every baseline shares: who may take the request at all, and how a choice becomes a decision.

A rule only picks among the replicas that fit, sorted by id so that its choice never hangs on the order of a snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from routing.cost import matched_tokens
from routing.policy import Policy, split
from routing.types import Candidate, Decision, ReplicaState, RouteRequest, Snapshot

Choice: TypeAlias = tuple[ReplicaState, str]
"""The replica, and why."""

Pick: TypeAlias = Callable[[RouteRequest, Snapshot, Sequence[ReplicaState]], Choice]
"""Chooses among at least one replica that fits."""


def policy(name: str, pick: Pick) -> Policy:
    """The policy that filters as every policy does and lets `pick` choose among the rest."""

    def decide(request: RouteRequest, snapshot: Snapshot) -> Decision:
        refused, fit = split(request, snapshot.replicas)
        if not fit:
            return Decision(request.request_id, name, None, tuple(refused), "no replica can take it")
        fit.sort(key=_replica_id)
        winner, reason = pick(request, snapshot, fit)
        matched = snapshot.matched_blocks
        weighed = [Candidate(r.replica_id, _tokens(request, matched.get(r.replica_id, 0))) for r in fit]
        return Decision(request.request_id, name, winner.replica_id, (*weighed, *refused), reason)

    return decide


def outstanding(replica: ReplicaState) -> int:
    """Requests there, running, waiting and on their way."""
    return replica.num_running + replica.num_waiting + replica.num_sent


def drawn(candidates: Sequence[ReplicaState], draw: float) -> ReplicaState:
    """One of them, by a draw from [0, 1)."""
    return candidates[int(draw * len(candidates))]


def least(candidates: Sequence[ReplicaState], draw: float) -> ReplicaState:
    """The one with the fewest requests; among equals the draw decides."""
    fewest = min(map(outstanding, candidates))
    return drawn([r for r in candidates if outstanding(r) == fewest], draw)


def two_choices(candidates: Sequence[ReplicaState], draw: float) -> ReplicaState:
    """The one with fewer requests of two drawn at random; the first drawn when they are equal."""
    if len(candidates) == 1:
        return candidates[0]
    num = len(candidates)
    pair = int(draw * num * (num - 1))  # every ordered pair of two different ones is equally likely
    first, second = divmod(pair, num - 1)
    second += second >= first
    a, b = candidates[first], candidates[second]
    return a if outstanding(a) <= outstanding(b) else b


def goes_on(request: RouteRequest, num_blocks: int) -> bool:
    """Whether blocks cannot tell who was sent the longest common prefix: the prompt goes on after `num_blocks` of them.

    The trees of other routers go on to the letter, where prompts that part after the same block still share a few by
    chance: of replicas that are equal in blocks one wins there, and nearly always one alone. In blocks that is luck.
    """
    return request.block_tokens > 1 and num_blocks * request.block_tokens < request.num_prompt_tokens


def _replica_id(replica: ReplicaState) -> str:
    return replica.replica_id


def _tokens(request: RouteRequest, num_blocks: int) -> int:
    return matched_tokens(request, num_blocks) if num_blocks else 0
