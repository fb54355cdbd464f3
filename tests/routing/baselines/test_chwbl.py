"""Consistent hashing with bounded loads."""

from __future__ import annotations

from collections import Counter

import pytest

from routing.baselines.chwbl import chwbl
from routing.types import RouteRequest, Snapshot
from tests.routing.baselines.cases import replica, replicas, request, snapshot

POLICY = chwbl()
IDLE = "a0 b0 c0 d0"


def prompt(seed: int) -> RouteRequest:
    """A prompt of 16 blocks that no other seed begins like."""
    return request(block_hashes=tuple((seed * 16 + i) * 11400714819323198485 % 2**64 for i in range(16)))


def home(seed: int, fleet: str = IDLE) -> str:
    chosen = POLICY(prompt(seed), snapshot(fleet)).replica_id
    assert chosen is not None
    return chosen


def test_a_prefix_stays_with_its_replica_while_that_is_not_overloaded() -> None:
    for seed in range(50):
        at_home = home(seed)
        busy = tuple(replica(i, 10 if i == at_home else 9) for i in "abcd")
        decision = POLICY(prompt(seed), Snapshot(busy))
        assert (decision.replica_id, decision.reason) == (at_home, "its prefix's place")


def test_prefixes_spread_over_all_replicas() -> None:
    assert all(150 < count < 350 for count in Counter(home(seed) for seed in range(1000)).values())


def test_a_replica_more_leaves_most_prefixes_where_they_were() -> None:
    moved = [(home(seed), home(seed, IDLE + " e0")) for seed in range(500)]
    assert all(before == after or after == "e" for before, after in moved)
    assert 40 < sum(after == "e" for _, after in moved) < 200


@pytest.mark.parametrize(
    ("at_home", "elsewhere", "stays"),
    [(3, 3, True), (4, 3, False), (11, 9, True), (12, 9, False)],
)
def test_a_replica_may_have_a_quarter_more_than_the_mean(at_home: int, elsewhere: int, stays: bool) -> None:
    mine = home(1)
    fleet = tuple(replica(i, at_home if i == mine else elsewhere) for i in "abcd")
    assert (at_home + 1 <= 1.25 * (at_home + 3 * elsewhere + 1) / 4) is stays
    assert (POLICY(prompt(1), Snapshot(fleet)).replica_id == mine) is stays


def test_with_too_few_requests_for_any_bound_everything_goes_home() -> None:
    mine = home(1)
    fleet = tuple(replica(i, 1 if i == mine else 0) for i in "abcd")
    decision = POLICY(prompt(1), Snapshot(fleet))
    assert (decision.replica_id, decision.reason) == (mine, "its prefix's place, all being overloaded")


def test_an_overloaded_home_hands_on_to_the_same_next_one_each_time() -> None:
    for seed in range(20):
        mine = home(seed)
        fleet = tuple(replica(i, 50 if i == mine else 1) for i in "abcd")
        chosen = {POLICY(prompt(seed), Snapshot(fleet, draw=draw)).replica_id for draw in (0.0, 0.5, 0.9)}
        assert len(chosen) == 1 and mine not in chosen
        alone = tuple(r for r in replicas(IDLE) if r.replica_id != mine)
        assert chosen == {POLICY(prompt(seed), Snapshot(alone)).replica_id}, "the next on the ring"


def test_the_key_is_the_prompts_beginning_only() -> None:
    hashes = prompt(3).block_hashes
    longer = request(4096, block_hashes=(*hashes, *range(48)))
    assert POLICY(longer, snapshot(IDLE)).replica_id == home(3)


def test_prompts_without_a_block_spread_by_their_id() -> None:
    chosen = Counter(POLICY(request(20, request_id=f"id{i}"), snapshot(IDLE)).replica_id for i in range(200))
    assert len(chosen) == 4
