"""The decisions an ingress keeps: by request, choice and attempt, for their own tenant, within bounds."""

from __future__ import annotations

from random import Random

import pytest

from gateway.decisions import MAX_NAMES, MAX_PER_CHOICE, MAX_SHOWN, Asked, DecisionLog, parse
from routing.types import Candidate, Decision, ReplicaState, RouteRequest

HEX = "0123456789abcdef01234567"
OWN = f"wg00000001-{HEX}"


def request(job_id: str = f"{OWN}-0", tenant: str = "t", adapter: str | None = None) -> RouteRequest:
    return RouteRequest(job_id, "m", adapter, (), 64, 100, 10, tenant)


def decision(winner: str | None = "a", num_candidates: int = 2) -> Decision:
    names = "abcdefgh"[:num_candidates]
    candidates = (Candidate(names[0], 64, (0.25, 0.5)),
                  *(Candidate(name, filtered="full") for name in names[1:]))  # fmt: skip
    return Decision("r", "warm", winner, candidates, "because")


class Wall:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def log(max_candidates: int = 1000) -> DecisionLog:
    return DecisionLog("wg00000001", Wall(), max_candidates)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (OWN, Asked(OWN, "wg00000001", None)),
        (f"chatcmpl-{OWN}", Asked(OWN, "wg00000001", None)),
        (f"cmpl-{OWN}-12", Asked(OWN, "wg00000001", 12)),
        (f"{OWN}-0", Asked(OWN, "wg00000001", 0)),
        ("trace-7", Asked("trace-7")),
        (f"chatcmpl-{OWN}-x", Asked(f"chatcmpl-{OWN}-x")),
        (f"{OWN}-99999", Asked(f"{OWN}-99999")),
        ("", Asked("")),
    ],
)
def test_an_id_names_its_ingress_and_its_choice(asked: str, expected: Asked) -> None:
    assert parse(asked) == expected


def test_a_request_is_found_whole_and_by_choice_with_every_attempt() -> None:
    kept = log()
    kept.add(request(f"{OWN}-0"), decision(), 1, ())
    kept.add(request(f"{OWN}-1"), decision("b"), 1, ())
    kept.add(request(f"{OWN}-0"), decision(None), 2, ())
    whole = kept.find(parse(OWN), "t")
    assert whole is not None and (whole.request_id, whole.ingress_id, whole.model) == (OWN, "wg00000001", "m")
    assert [(d.choice, d.attempt, d.replica_id, d.time) for d in whole.decisions] == [
        (0, 1, "a", 1001.0), (1, 1, "b", 1002.0), (0, 2, None, 1003.0),
    ]  # fmt: skip
    second = kept.find(parse(f"{OWN}-1"), "t")
    assert second is not None and [d.replica_id for d in second.decisions] == ["b"]
    best, other = second.decisions[0].candidates
    assert (best.cost_s, best.terms_s, best.matched_tokens) == (0.75, {"queue": 0.25, "prefill": 0.5}, 64)
    assert (other.filtered, other.terms_s) == ("full", {})
    assert kept.find(parse(f"{OWN}-2"), "t") is None


def test_a_tenant_sees_its_own_requests_alone() -> None:
    kept = log()
    kept.add(request(tenant="t"), decision(), 1, ())
    kept.name("t", "mine", OWN)
    assert kept.find(parse(OWN), "t") and kept.find(parse("mine"), "t")
    assert kept.find(parse(OWN), "u") is None and kept.find(parse("mine"), "u") is None
    kept.name("u", "stolen", OWN)
    assert kept.find(parse("stolen"), "u") is None


def test_where_the_adapter_was_is_told_for_each_candidate() -> None:
    states = [
        ReplicaState("a", "m", 512, 8, adapters=("x@1",)),
        ReplicaState("b", "m", 512, 8, loading=(("x@1", 0.2),)),
        ReplicaState("c", "m", 512, 8, adapters=("y@1",)),
    ]
    kept = log()
    kept.add(request(adapter="x@1"), decision(num_candidates=3), 1, states)
    found = kept.find(parse(OWN), "t")
    assert found is not None and found.adapter == "x@1"
    assert [c.adapter for c in found.decisions[0].candidates] == ["resident", "loading", "absent"]


def test_the_oldest_requests_make_room_and_the_bound_holds_whatever_comes() -> None:
    rng = Random(4)
    kept = log(max_candidates=100)
    for i in range(2000):
        base = f"wg00000001-{rng.randrange(60):024x}"
        kept.add(request(f"{base}-{rng.randrange(4)}"), decision(num_candidates=rng.randrange(1, 8)), 1, ())
        held = sum(len(r.decision.candidates) for t in kept._traces.values() for c in t.choices.values() for r in c)
        assert held == kept._num_candidates <= 100, f"{i=}"
    assert kept.last(f"{base}-9") is None


def test_a_sequence_that_finds_no_replica_for_long_keeps_its_last_decisions() -> None:
    kept = log()
    for attempt in range(1, 41):
        kept.add(request(), decision(None), attempt, ())
    found = kept.find(parse(OWN), "t")
    assert found is not None
    assert [d.attempt for d in found.decisions] == list(range(41 - MAX_PER_CHOICE, 41))


def test_more_decisions_than_are_shown_are_counted() -> None:
    kept = log()
    for choice in range(MAX_SHOWN + 5):
        kept.add(request(f"{OWN}-{choice}"), decision(), 1, ())
    found = kept.find(parse(OWN), "t")
    assert found is not None and len(found.decisions) == MAX_SHOWN and found.num_left_out == 5


def test_names_that_clients_give_are_bounded_too() -> None:
    kept = log()
    for i in range(MAX_NAMES + 10):
        kept.name("t", f"name-{i}", OWN)
    assert len(kept._names) == MAX_NAMES
