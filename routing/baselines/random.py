"""Any replica, by the snapshot's draw."""

from __future__ import annotations

from collections.abc import Sequence

from routing.baselines.rule import Choice, drawn, policy
from routing.types import ReplicaState, RouteRequest, Snapshot


def _pick(request: RouteRequest, snapshot: Snapshot, fit: Sequence[ReplicaState]) -> Choice:
    return drawn(fit, snapshot.draw), "drawn"


random = policy("random", _pick)
