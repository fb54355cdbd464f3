"""The cost of Dynamo's KV router."""

from __future__ import annotations

from collections import Counter

import pytest

from routing.baselines.overlap_cost import overlap_cost
from routing.types import ReplicaState, Snapshot
from tests.routing.baselines.cases import replica, request

POLICY = overlap_cost("overlap_cost")


@pytest.mark.parametrize(
    ("a", "b", "matched", "winner"),
    [
        # 16 blocks of prompt, 8 cached at a: a may have 8 blocks more of anything before b is cheaper
        (replica("a"), replica("b"), {"a": 8}, "a"),
        (replica("a", num_waiting_tokens=511), replica("b"), {"a": 8}, "a"),
        (replica("a", num_waiting_tokens=513), replica("b"), {"a": 8}, "b"),
        (replica("a", num_free_blocks=9_969), replica("b"), {"a": 8}, "a"),  # 31 blocks of 16 tokens in use
        (replica("a", num_free_blocks=9_967), replica("b"), {"a": 8}, "b"),
        (replica("a", num_sent_tokens=255), replica("b"), {"a": 8}, "a"),  # counts as prefill and as blocks
        (replica("a", num_sent_tokens=257), replica("b"), {"a": 8}, "b"),
        (replica("a", 100), replica("b"), {"a": 1}, "a"),  # the number of requests is nothing
    ],
)
def test_lowest_cost_table(a: ReplicaState, b: ReplicaState, matched: dict[str, int], winner: str) -> None:
    assert POLICY(request(), Snapshot((a, b), matched)).replica_id == winner


def test_the_reason_tells_the_cost_in_blocks() -> None:
    decision = POLICY(request(), Snapshot((replica("a"), replica("b")), {"a": 4}))
    assert decision.reason == "lowest of 2 costs: 28.0 blocks"  # 12 to compute and 16 to hold


def test_equal_costs_are_drawn_among() -> None:
    fleet = tuple(map(replica, "abcd"))
    assert {POLICY(request(), Snapshot(fleet, draw=d / 8)).replica_id for d in range(8)} == set("abcd")


def test_an_overlap_weight_of_zero_balances_the_load_alone() -> None:
    blind = overlap_cost("blind", overlap_weight=0.0)
    warm = replica("a", num_free_blocks=9_999)
    assert blind(request(), Snapshot((warm, replica("b")), {"a": 16})).replica_id == "b"


def test_a_temperature_draws_by_softmax_over_the_range_of_costs() -> None:
    warm = overlap_cost("warm", temperature=1.0)
    fleet = (replica("a"), replica("b", num_waiting_tokens=640))
    chosen = Counter(warm(request(), Snapshot(fleet, draw=i / 1000)).replica_id for i in range(1000))
    assert chosen["a"] == pytest.approx(1000 / (1 + 2.718281828**-1), abs=2)
