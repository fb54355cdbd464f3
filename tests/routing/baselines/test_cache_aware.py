"""The rule of SGLang's router and vllm-router, with both sets of defaults."""

from __future__ import annotations

import pytest

from routing.baselines.cache_aware import SGLANG, VLLM_ROUTER, cache_aware
from tests.routing.baselines.cases import request, snapshot

POLICIES = {"vllm": cache_aware("vllm", VLLM_ROUTER), "sglang": cache_aware("sglang", SGLANG)}
PREFIX = "was sent the longest prefix"
COLD = "no prefix to speak of: fewest requests"
UNEVEN = "imbalanced: fewest requests"


@pytest.mark.parametrize(
    ("defaults", "loads", "matched", "winner", "reason"),
    [
        ("vllm", "a5 b0", {"a": 5}, "a", PREFIX),  # 320 of 1,024 tokens: 31 %
        ("vllm", "a5 b0", {"a": 4}, "b", COLD),  # 25 %
        ("sglang", "a5 b0", {"a": 8}, "b", COLD),  # 50 %: must be more
        ("sglang", "a5 b0", {"a": 9}, "a", PREFIX),
        ("vllm", "a64 b0", {"a": 16}, "a", PREFIX),
        ("vllm", "a65 b0", {"a": 16}, "b", UNEVEN),
        ("sglang", "a32 b0", {"a": 16}, "a", PREFIX),
        ("sglang", "a33 b0", {"a": 16}, "b", UNEVEN),
        ("vllm", "a195 b130", {"a": 16}, "a", PREFIX),  # 65 more, but only 1.5 times
        ("vllm", "a196 b130", {"a": 16}, "b", UNEVEN),
        ("sglang", "a163 b130", {"a": 16}, "b", UNEVEN),
        ("vllm", "a9 b3 c3", {}, "b", COLD),  # the first of equals
        ("vllm", "a9 b3 c3", {"c": 12, "a": 3}, "c", PREFIX),
        ("vllm", "a9 b3", {"gone": 16}, "b", COLD),
    ],
)
def test_table(defaults: str, loads: str, matched: dict[str, int], winner: str, reason: str) -> None:
    decision = POLICIES[defaults](request(), snapshot(loads, matched_blocks=matched))
    assert (decision.replica_id, decision.reason) == (winner, reason)


def test_which_of_several_with_the_longest_prefix_is_luck() -> None:
    matched = {"c": 12, "b": 12, "a": 3}
    chosen = [
        POLICIES["vllm"](request(), snapshot("a9 b3 c3", matched_blocks=matched, draw=draw)).replica_id
        for draw in (0.0, 0.49, 0.5, 0.99)
    ]
    assert chosen == ["b", "b", "c", "c"]


def test_the_trees_bound_is_told_in_tokens_of_four_characters() -> None:
    assert VLLM_ROUTER.mirror_tokens == 8_388_608
    assert SGLANG.mirror_tokens == 4_194_304
