"""Policies without cost or cache, to compare with and to fall back to."""

from __future__ import annotations

from routing.policy import split
from routing.types import Candidate, Decision, ReplicaState, RouteRequest, Snapshot


def round_robin(request: RouteRequest, snapshot: Snapshot) -> Decision:
    """Replica after replica, by the snapshot's turn."""
    refused, fit = split(request, snapshot.replicas)
    fit.sort(key=_replica_id)
    winner = fit[snapshot.turn % len(fit)] if fit else None
    return _decide(request, "round_robin", winner, (refused, fit))


def random(request: RouteRequest, snapshot: Snapshot) -> Decision:
    """Any replica, by the snapshot's draw."""
    refused, fit = split(request, snapshot.replicas)
    winner = fit[int(snapshot.draw * len(fit))] if fit else None
    return _decide(request, "random", winner, (refused, fit))


def _replica_id(replica: ReplicaState) -> str:
    return replica.replica_id


def _decide(
    request: RouteRequest,
    policy: str,
    winner: ReplicaState | None,
    considered: tuple[list[Candidate], list[ReplicaState]],
) -> Decision:
    refused, fit = considered
    candidates = (*(Candidate(r.replica_id) for r in fit), *refused)
    if winner is None:
        return Decision(request.request_id, policy, None, candidates, "no replica can take it")
    return Decision(request.request_id, policy, winner.replica_id, candidates, policy.replace("_", " "))
