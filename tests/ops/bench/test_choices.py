"""Asking a rule again: its own choices are explained, those of another are not."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import msgspec
import pytest

from ops.bench.choices import explained
from ops.bench.replay import Outcome
from ops.bench.trace_slice import ReplayRequest
from routing.policies import POLICIES

REPLICAS = ("alpha", "beta", "gamma", "delta")
Choose = Callable[[int, str, list[int]], int]
"""(request, prompt, requests at each replica) → replica."""


def played(choose: Choose, num: int = 250) -> tuple[list[ReplayRequest], list[Outcome]]:
    """Conversations of strangers' letters, a request every 10 ms; an answer takes 10 to 150 ms."""
    random = Random(1)
    begun = ["".join(random.choices("abcdefgh", k=30)) for _ in range(40)]
    requests: list[ReplayRequest] = []
    outcomes: list[Outcome] = []
    for index in range(num):
        prompt = random.choice(begun) + "".join(random.choices("abcdefgh", k=10))
        at = index / 100
        loads = [sum(o.replica == name and o.ended_s > at for o in outcomes) for name in REPLICAS]
        name = REPLICAS[choose(index, prompt, loads)]
        requests.append(ReplayRequest(at, prompt, 1, 1.0))
        outcomes.append(Outcome(0.01, 40, 0, name, at, at + random.uniform(0.01, 0.15)))
    return requests, outcomes


def least(index: int, prompt: str, loads: list[int]) -> int:
    return loads.index(min(loads))


def of_two(index: int, prompt: str, loads: list[int]) -> int:
    pair = Random(index).sample(range(4), 2)
    return min(pair, key=loads.__getitem__)


def anyone(index: int, prompt: str, loads: list[int]) -> int:
    return Random(index).randrange(4)


def by_letters(index: int, prompt: str, loads: list[int]) -> int:
    return sum(map(ord, prompt[:30])) % 4


def test_a_rule_s_own_choices_are_explained_by_it_whatever_its_luck() -> None:
    for name, choose in (("power_of_two", of_two), ("least_outstanding", least), ("random", anyone)):
        assert explained(POLICIES[name], *played(choose), Random(2)) == pytest.approx(1.0, abs=0.05), name


def test_another_rule_s_choices_are_not() -> None:
    requests, outcomes = played(by_letters)
    assert explained(POLICIES["power_of_two"], requests, outcomes, Random(2)) < 0.8
    requests, outcomes = played(least)
    assert explained(POLICIES["power_of_two"], requests, outcomes, Random(2)) > 1.1, "better than its luck"
    assert explained(POLICIES["prefix_affinity"], requests, outcomes, Random(2)) < 0.6


def test_affinity_is_seen_by_who_was_sent_the_longest_prefix_before() -> None:
    requests, outcomes = played(by_letters)
    assert explained(POLICIES["cache_aware"], requests, outcomes, Random(2)) > 0.85, "all but first turns"


def test_without_a_choice_there_is_nothing_to_explain() -> None:
    requests, outcomes = played(lambda index, prompt, loads: 0, num=10)
    assert explained(POLICIES["random"], requests, outcomes, Random(2)) == 0.0
    nobody = [msgspec.structs.replace(outcome, replica="") for outcome in outcomes]
    assert explained(POLICIES["random"], requests, nobody, Random(2)) == 0.0
