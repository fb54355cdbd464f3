"""The names a profile's `routing.policy` may have, and what each needs to know.

Adding a policy: one function, one test, one line here (and its name in `configs.schema.RoutingConfig`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from routing.baselines.cache_aware import SGLANG, VLLM_ROUTER, cache_aware
from routing.baselines.chwbl import chwbl
from routing.baselines.greedy_ttft import greedy_ttft
from routing.baselines.least_outstanding import least_outstanding
from routing.baselines.overlap_cost import overlap_cost
from routing.baselines.power_of_two import power_of_two
from routing.baselines.prefix_affinity import prefix_affinity
from routing.baselines.random import random
from routing.baselines.round_robin import round_robin
from routing.policy import Policy
from routing.warm import warm

UNBOUNDED_TOKENS = 2**62
"""The mirror of a rule that never forgets."""


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A policy and what fills its snapshots.

    `reads` says where `Snapshot.matched_blocks` comes from: `events` = the index of what replicas hold; `mirror` =
    `routing.mirror` of what this router sent, with `held_blocks`; `none` = left empty. `mirror_tokens`: how much the
    mirror remembers of each replica; None = as much as its KV cache holds. `weighs_seconds`: its costs are seconds for
    all concerned, so that what one request saves by waiting can be told (`gateway.binding`).
    """

    name: str
    decide: Policy
    reads: Literal["events", "mirror", "none"]
    source: str
    mirror_tokens: int | None = None
    weighs_seconds: bool = False

    def mirror_blocks(self, block_tokens: int, kv_tokens: int) -> int:
        """The mirror's bound in routing blocks, for a replica whose cache holds `kv_tokens`."""
        return (kv_tokens if self.mirror_tokens is None else self.mirror_tokens) // block_tokens


_SPECS = (
    PolicySpec("warm", warm, "events", "warmgate", weighs_seconds=True),
    PolicySpec("round_robin", round_robin, "none", "most load balancers"),
    PolicySpec("random", random, "none", "most load balancers"),
    PolicySpec("power_of_two", power_of_two, "none", "Mitzenmacher 2001; Ray Serve 2.60"),
    PolicySpec("least_outstanding", least_outstanding, "none", "KubeAI LeastLoad, Envoy, nginx"),
    PolicySpec("chwbl", chwbl(), "none", "Mirrokni et al. 2018; KubeAI PrefixHash"),
    PolicySpec(
        "cache_aware",
        cache_aware("cache_aware", VLLM_ROUTER),
        "mirror",
        "vllm-router 0.1.17, sglang_router 0.2+",
        VLLM_ROUTER.mirror_tokens,
    ),
    PolicySpec(
        "cache_aware_sglang",
        cache_aware("cache_aware_sglang", SGLANG),
        "mirror",
        "sglang_router 0.1",
        SGLANG.mirror_tokens,
    ),
    PolicySpec("prefix_affinity", prefix_affinity("prefix_affinity"), "mirror", "Ray Serve LLM 2.60", UNBOUNDED_TOKENS),
    PolicySpec(
        "prefix_affinity_balanced",
        prefix_affinity("prefix_affinity_balanced", imbalanced_threshold=10),
        "mirror",
        "Ray Serve LLM 2.49 to 2.53",
        UNBOUNDED_TOKENS,
    ),
    PolicySpec("overlap_cost", overlap_cost("overlap_cost"), "events", "NVIDIA Dynamo 1.x"),
    PolicySpec("greedy_ttft", greedy_ttft, "events", "Mooncake, FAST 2025, algorithm 1"),
)

POLICIES: Mapping[str, PolicySpec] = MappingProxyType({spec.name: spec for spec in _SPECS})


def policy_named(name: str) -> PolicySpec:
    """Raises ValueError, naming all there are, for a name that is not in the table."""
    if name not in POLICIES:
        raise ValueError(f"no policy named {name!r}; there are {', '.join(POLICIES)}")
    return POLICIES[name]
