"""Filter, weigh, pick: pure functions of a request and a frozen snapshot, with the reasons kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from xxhash import xxh3_64_intdigest

from routing.types import Candidate, Decision, ReplicaState, RouteRequest, Snapshot

Policy: TypeAlias = Callable[[RouteRequest, Snapshot], Decision]
"""Never raises: with nobody to pick, the decision's replica is None and every candidate says why."""

TIE_S = 0.001
"""Costs this close to the lowest are equal: nobody feels it, and noise must not scatter a prefix."""

TOO_LONG = "prompt too long"
NO_ADAPTERS = "no adapters"
OTHER_MODEL = "other model"


def unfit(request: RouteRequest, replica: ReplicaState) -> str | None:
    """Why this replica cannot take the request, or None when it can."""
    if replica.model != request.model:
        return OTHER_MODEL
    if replica.draining:
        return "draining"
    if replica.breaker_open:
        return "breaker open"
    if replica.replica_id in request.excluded:
        return "failed this request"
    if request.num_prompt_tokens >= replica.max_model_len:
        return TOO_LONG
    if replica.num_blocks and request.num_prompt_tokens >= replica.num_blocks * replica.block_size:
        return TOO_LONG
    if request.adapter is not None and not replica.max_adapters:
        return NO_ADAPTERS
    return None


def split(request: RouteRequest, replicas: Sequence[ReplicaState]) -> tuple[list[Candidate], list[ReplicaState]]:
    """Those that should not take the request, as candidates saying why; and those that should.

    Full replicas count as fit only when there are no others.
    """
    refused = []
    fit = []
    for replica in replicas:
        reason = unfit(request, replica)
        if reason is None:
            fit.append(replica)
        else:
            refused.append(Candidate(replica.replica_id, filtered=reason))
    if any(replica.full for replica in fit) and not all(replica.full for replica in fit):
        refused += [Candidate(replica.replica_id, filtered="full") for replica in fit if replica.full]
        fit = [replica for replica in fit if not replica.full]
    return refused, fit


def rendezvous(request: RouteRequest, candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the highest hash of (first block, replica); without a full block the request's id decides."""
    key = request.block_hashes[0] if request.block_hashes else xxh3_64_intdigest(request.request_id.encode())
    scores = [xxh3_64_intdigest(c.replica_id.encode(), key) for c in candidates]
    highest = max(scores)
    return max((c for c, score in zip(candidates, scores, strict=True) if score == highest), key=_replica_id)


def _replica_id(candidate: Candidate) -> str:
    return candidate.replica_id
