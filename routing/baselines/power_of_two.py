"""The less busy of two replicas drawn at random (Mitzenmacher 2001).

The default of Ray Serve (2.60, `PowerOfTwoChoicesRequestRouter`, by ongoing requests) and a policy of SGLang's and
vLLM's routers (by requests in flight). Both count requests, not tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from routing.baselines.rule import Choice, policy, two_choices
from routing.types import ReplicaState, RouteRequest, Snapshot


def _pick(request: RouteRequest, snapshot: Snapshot, fit: Sequence[ReplicaState]) -> Choice:
    return two_choices(fit, snapshot.draw), "fewer requests of two drawn"


power_of_two = policy("power_of_two", _pick)
