"""The names a profile's `routing.policy` may have."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from routing.baselines import random, round_robin
from routing.policy import Policy, least_wait

POLICIES: Mapping[str, Policy] = MappingProxyType(
    {"least_wait": least_wait, "round_robin": round_robin, "random": random}
)
"""Adding a policy: one function, one test, one line here (and its name in `configs.schema.RoutingConfig`)."""
