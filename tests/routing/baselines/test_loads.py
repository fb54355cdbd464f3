"""Rules that look at loads alone: round robin, random, power of two, least outstanding."""

from __future__ import annotations

from collections import Counter

import pytest

from routing.baselines.least_outstanding import least_outstanding
from routing.baselines.power_of_two import power_of_two
from routing.baselines.random import random
from routing.baselines.round_robin import round_robin
from routing.types import Snapshot
from tests.routing.baselines.cases import replica, request, snapshot


def test_round_robin_takes_turns_over_those_that_can() -> None:
    fleet = (replica("c"), replica("a"), replica("d", draining=True), replica("b"))
    chosen = [round_robin(request(), Snapshot(fleet, turn=turn)).replica_id for turn in range(6)]
    assert chosen == ["a", "b", "c", "a", "b", "c"]


def test_random_follows_the_draw_it_is_given() -> None:
    chosen = [random(request(), snapshot("a0 b9 c0 d0", draw=draw)).replica_id for draw in (0.0, 0.3, 0.6, 0.999999)]
    assert chosen == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("loads", "draw", "winner"),
    [
        ("a3 b0", 0.0, "b"),
        ("a3 b0", 0.99, "b"),
        ("a1 b1", 0.0, "a"),  # equal: the first drawn
        ("a1 b1", 0.5, "b"),
        ("a9 b5 c0", 0.0, "b"),  # the idle one was not drawn
        ("a9 b5 c0", 0.2, "c"),
        ("a7", 0.7, "a"),
    ],
)
def test_power_of_two_takes_the_less_busy_of_the_two_it_draws(loads: str, draw: float, winner: str) -> None:
    assert power_of_two(request(), snapshot(loads, draw=draw)).replica_id == winner


def test_power_of_two_draws_every_ordered_pair_equally_often() -> None:
    draws = [i / 1200 for i in range(1200)]
    chosen = Counter(power_of_two(request(), snapshot("a0 b1 c2 d3", draw=draw)).replica_id for draw in draws)
    assert chosen == {"a": 600, "b": 400, "c": 200}  # 6, 4 and 2 of the 12 ordered pairs; d loses every one


@pytest.mark.parametrize(
    ("loads", "draw", "winner"),
    [("a2 b1 c3", 0.0, "b"), ("a1 b1 c3", 0.0, "a"), ("a1 b1 c3", 0.5, "b"), ("a1 b1 c1", 0.99, "c")],
)
def test_least_outstanding_takes_the_fewest_and_draws_among_equals(loads: str, draw: float, winner: str) -> None:
    assert least_outstanding(request(), snapshot(loads, draw=draw)).replica_id == winner


def test_requests_that_wait_or_are_on_their_way_count_like_running_ones() -> None:
    fleet = (replica("a", 1, num_waiting=1), replica("b", 1, num_sent=1), replica("c", 1))
    assert least_outstanding(request(), Snapshot(fleet)).replica_id == "c"
    assert least_outstanding(request(), Snapshot(fleet[:2], draw=0.9)).replica_id == "b"
