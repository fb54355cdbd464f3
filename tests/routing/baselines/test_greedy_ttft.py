"""Least estimated time to first token."""

from __future__ import annotations

import pytest

from routing.baselines.greedy_ttft import greedy_ttft
from routing.types import ReplicaState, Snapshot
from tests.routing.baselines.cases import replica, request


@pytest.mark.parametrize(
    ("a", "b", "matched", "winner"),
    [
        (replica("a"), replica("b"), {"a": 1}, "a"),
        (replica("a", num_waiting_tokens=500), replica("b"), {"a": 8}, "a"),  # waits for 500, saves 512
        (replica("a", num_waiting_tokens=500, num_sent_tokens=13), replica("b"), {"a": 8}, "b"),
        (replica("a", num_waiting_tokens=900), replica("b", prefill_tokens_per_s=500.0), {}, "a"),
        (replica("a", num_waiting_tokens=1100), replica("b", prefill_tokens_per_s=500.0), {}, "b"),
        (replica("a", prefill_tokens_per_s=0.0), replica("b", prefill_tokens_per_s=9e9), {"a": 1}, "a"),  # same
        (replica("a", 200), replica("b"), {"a": 1}, "a"),  # who decodes there is nothing
    ],
)
def test_table(a: ReplicaState, b: ReplicaState, matched: dict[str, int], winner: str) -> None:
    assert greedy_ttft(request(), Snapshot((a, b), matched)).replica_id == winner


def test_the_reason_tells_the_seconds() -> None:
    decision = greedy_ttft(request(), Snapshot((replica("a", num_waiting_tokens=1000),), {"a": 8}))
    assert decision.reason == "first token expected in 1.512 s"
