"""Replica after replica. What most HTTP load balancers do unless told otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from routing.baselines.rule import Choice, policy
from routing.types import ReplicaState, RouteRequest, Snapshot


def _pick(request: RouteRequest, snapshot: Snapshot, fit: Sequence[ReplicaState]) -> Choice:
    return fit[snapshot.turn % len(fit)], "its turn"


round_robin = policy("round_robin", _pick)
