"""The replica with the fewest requests (KubeAI's `LeastLoad`, Envoy's `LEAST_REQUEST` over all hosts, nginx's
`least_conn`). It counts requests, not tokens; among equals the draw decides, so that ingresses do not herd."""

from __future__ import annotations

from collections.abc import Sequence

from routing.baselines.rule import Choice, least, policy
from routing.types import ReplicaState, RouteRequest, Snapshot


def _pick(request: RouteRequest, snapshot: Snapshot, fit: Sequence[ReplicaState]) -> Choice:
    return least(fit, snapshot.draw), "fewest requests"


least_outstanding = policy("least_outstanding", _pick)
