"""Deciding with no more than one's own traffic."""

from __future__ import annotations

from random import Random

import pytest

from routing.policies import policy_named
from routing.traffic import OwnTraffic, Seen, TrafficOptions
from routing.types import Decision, RouteRequest
from tests.routing.baselines.cases import request


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def traffic(policy: str = "greedy_ttft", clock: Clock | None = None, **options: object) -> OwnTraffic:
    made = TrafficOptions(prefill_tokens_per_s=1000.0, **options)  # type: ignore[arg-type]
    return OwnTraffic(policy_named(policy), made, clock or Clock(), Random(1))


def prompt(seed: int, num_tokens: int = 1024) -> RouteRequest:
    return request(num_tokens, block_hashes=tuple(1000 * seed + i for i in range(num_tokens // 64)))


def send(to: OwnTraffic, asked: RouteRequest, *replicas: Seen) -> Decision:
    decision = to.decide(asked, replicas)
    assert decision.replica_id is not None
    to.sent(asked, decision, decision.replica_id)
    return decision


A, B = Seen("a", 0), Seen("b", 0)


def test_a_prompt_goes_where_its_prefix_went() -> None:
    own = traffic()
    for seed in range(10):
        first = send(own, prompt(seed), A, B).replica_id
        again = send(own, prompt(seed, 2048), A, B)
        assert again.replica_id == first
        assert again.winner is not None and again.winner.matched_tokens == 1024


def test_tokens_sent_wait_until_the_replica_has_had_time_to_compute_them() -> None:
    clock = Clock()
    own = traffic(clock=clock)
    busy = Seen("a", 1)
    own.sent(prompt(1, 4096), own.decide(prompt(1, 4096), [busy]), "a")
    assert own.decide(prompt(2), [busy, B]).replica_id == "b"
    clock.now += 2.0
    assert own.decide(prompt(1, 5120), [busy, B]).replica_id == "a", "2,096 tokens wait there, 4,096 are cached"
    clock.now += 10.0
    seconds = own.decide(prompt(3), [busy]).reason
    assert seconds == "first token expected in 1.024 s"


def test_an_idle_replica_has_nothing_waiting_whatever_was_reckoned() -> None:
    own = traffic()
    own.sent(prompt(1, 8192), own.decide(prompt(1, 8192), [A]), "a")
    assert own.decide(prompt(2), [A]).reason == "first token expected in 1.024 s"


def test_what_a_replica_tells_of_itself_replaces_what_is_reckoned() -> None:
    own = traffic()
    told = Seen("a", 3, told={"num_waiting_tokens": 500, "prefill_tokens_per_s": 2000.0, "colour": "red"})
    assert own.decide(prompt(1), [told]).reason == "first token expected in 0.762 s"


def test_a_full_replica_is_passed_over() -> None:
    own = traffic("least_outstanding")
    assert own.decide(prompt(1), [Seen("a", 1, full=True), Seen("b", 7)]).replica_id == "b"


def test_a_replica_that_left_comes_back_cold() -> None:
    own = traffic()
    send(own, prompt(1), A)
    own.keep([])
    decision = own.decide(prompt(1), [A])
    assert decision.winner is not None and decision.winner.matched_tokens == 0


def test_memory_of_a_replica_is_as_large_as_its_cache() -> None:
    own = traffic(kv_tokens=1024)
    send(own, prompt(1), A)
    send(own, prompt(2), A)
    decision = own.decide(prompt(1), [A])
    assert decision.winner is not None and decision.winner.matched_tokens == 0


def test_a_policy_that_does_not_exist_is_an_error_that_names_all_there_are() -> None:
    with pytest.raises(ValueError, match=r"no policy named 'best'; there are .*round_robin"):
        policy_named("best")
