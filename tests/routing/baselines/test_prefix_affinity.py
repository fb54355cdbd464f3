"""The rule of Ray Serve LLM's PrefixCacheAffinityRouter."""

from __future__ import annotations

import pytest

from routing.baselines.prefix_affinity import prefix_affinity
from tests.routing.baselines.cases import request, snapshot

ALWAYS = prefix_affinity("always")
BALANCED = prefix_affinity("balanced", imbalanced_threshold=10)
PREFIX = "was sent the longest prefix"
COLD = "no prefix to speak of: was sent the least so far"
UNEVEN = "imbalanced: fewer requests of two drawn"


@pytest.mark.parametrize(
    ("policy", "loads", "matched", "held", "winner", "reason"),
    [
        (ALWAYS, "a99 b0", {"a": 2}, {}, "a", PREFIX),  # 128 of 1,024 tokens, whatever the load
        (ALWAYS, "a9 b0", {"a": 1}, {"a": 1}, "b", COLD),  # 6 %
        (ALWAYS, "a9 b0", {}, {"b": 500, "a": 400}, "a", COLD),  # the smallest tree, not the shortest queue
        (ALWAYS, "a9 b2 c5", {}, {"a": 3, "b": 3, "c": 3}, "b", COLD),  # shortest queue among the smallest
        (ALWAYS, "a9 b2 c5", {"a": 16, "c": 16, "b": 6}, {}, "c", PREFIX),  # all of it: the shortest queue
        (BALANCED, "a10 b0", {"a": 16}, {}, "a", PREFIX),
        (BALANCED, "a11 b0", {"a": 16}, {}, "b", UNEVEN),
    ],
)
def test_table(
    policy: object, loads: str, matched: dict[str, int], held: dict[str, int], winner: str, reason: str
) -> None:
    decision = policy(request(), snapshot(loads, matched_blocks=matched, held_blocks=held))  # type: ignore[operator]
    assert (decision.replica_id, decision.reason) == (winner, reason)


def test_whose_common_prefix_is_the_longest_beyond_the_blocks_is_luck() -> None:
    chosen = [
        ALWAYS(request(), snapshot("a9 b2 c5", matched_blocks={"a": 7, "c": 7, "b": 6}, draw=draw)).replica_id
        for draw in (0.0, 0.49, 0.5, 0.99)
    ]
    assert chosen == ["a", "a", "c", "c"]
    letters = request(7, block_tokens=1, block_hashes=(1, 2, 3, 4, 5, 6, 7))
    exact = snapshot("a9 b2 c5", matched_blocks={"a": 6, "c": 6}, draw=0.0)
    assert ALWAYS(letters, exact).replica_id == "c", "blocks of one leave nothing to luck"


def test_when_loads_differ_too_much_the_choice_is_that_of_power_of_two() -> None:
    fleet = snapshot("a30 b20 c0", matched_blocks={"a": 16}, draw=0.0)
    assert BALANCED(request(), fleet).replica_id == "b", "a and b were drawn"
