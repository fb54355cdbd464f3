"""Policies: pure functions of a snapshot."""

from __future__ import annotations

import msgspec
import pytest

from configs.schema import RoutingConfig
from routing.baselines.random import random
from routing.baselines.round_robin import round_robin
from routing.policies import POLICIES
from routing.policy import TOO_LONG
from routing.types import Decision, ReplicaState, RouteRequest, Snapshot
from routing.waiting import merged, pending_of
from routing.warm import warm


def request(num_tokens: int = 1024, **changes: object) -> RouteRequest:
    base = RouteRequest("r1", "m", None, tuple(range(num_tokens // 64)), 64, num_tokens, 100)
    return msgspec.structs.replace(base, **changes)


def replica(replica_id: str, **changes: object) -> ReplicaState:
    base = ReplicaState(
        replica_id, "m", max_model_len=8192, max_num_seqs=32, num_free_blocks=1000, num_blocks=1000,
        prefill_tokens_per_s=4000.0, step_time_s=0.02,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def choose(
    *replicas: ReplicaState, matched: dict[str, int] | None = None, asked: RouteRequest | None = None
) -> Decision:
    return warm(asked or request(), Snapshot(replicas, matched or {}))


def test_an_equal_replica_with_a_warm_prefix_wins() -> None:
    for holder in "abc":
        decision = choose(*map(replica, "abc"), matched={holder: 8})
        assert decision.replica_id == holder
        assert decision.winner is not None
        assert decision.winner.matched_tokens == 512


def test_a_warm_prefix_loses_to_a_queue_that_costs_more_than_it_saves() -> None:
    warm, cold = replica("warm", num_waiting=4, num_waiting_tokens=2000), replica("cold")
    assert choose(warm, cold, matched={"warm": 15}).replica_id == "warm"  # saves 960 tokens thrice, waits for 2000
    busier = msgspec.structs.replace(warm, num_waiting_tokens=4000)
    assert choose(busier, cold, matched={"warm": 15}).replica_id == "cold"


def test_what_was_sent_since_the_last_push_counts_like_what_waits() -> None:
    assert choose(replica("a", num_sent=1, num_sent_tokens=1000), replica("b")).replica_id == "b"


def test_the_faster_of_two_equally_loaded_replicas_wins() -> None:
    slow = replica("slow", num_waiting_tokens=1000, num_waiting=1)
    fast = replica("fast", num_waiting_tokens=1000, num_waiting=1, prefill_tokens_per_s=8000.0)
    assert choose(slow, fast).replica_id == "fast"


def test_a_rate_that_one_candidate_lacks_is_dropped_for_all() -> None:
    unknown = replica("unknown", prefill_tokens_per_s=0.0, num_waiting=1, num_waiting_tokens=100)
    slow = replica("slow", prefill_tokens_per_s=10.0)
    decision = choose(unknown, slow)
    own = {c.replica_id: c.terms_s["prefill"] for c in decision.candidates}
    assert own["unknown"] == own["slow"] == pytest.approx(1024 / 10.0)
    assert decision.replica_id == "slow"
    filtered = replica("gone", prefill_tokens_per_s=0.0, draining=True)
    fast = replica("fast", prefill_tokens_per_s=100.0)
    assert choose(filtered, slow, fast).replica_id == "fast", "only candidates count"


def test_with_no_rate_known_at_all_the_shorter_queue_still_wins() -> None:
    a = replica("a", prefill_tokens_per_s=0.0, step_time_s=0.0, num_waiting=2, num_waiting_tokens=500)
    b = replica("b", prefill_tokens_per_s=0.0, step_time_s=0.0)
    assert choose(a, b).replica_id == "b"


def test_fewer_running_requests_win_when_nothing_else_differs() -> None:
    assert choose(replica("a", num_running=20), replica("b", num_running=2)).replica_id == "b"


def test_waiting_for_a_place_costs_more_than_a_cold_prefix() -> None:
    crowded = replica("crowded", num_running=32, num_waiting=3)
    decision = choose(crowded, replica("cold", num_running=8), matched={"crowded": 2})
    assert decision.replica_id == "cold"
    by_id = {c.replica_id: c for c in decision.candidates}
    assert by_id["crowded"].terms_s["places"] > 0
    assert "places" not in by_id["cold"].terms_s


def test_a_replica_short_of_kv_blocks_pays_for_it() -> None:
    short = replica("short", num_running=3, num_free_blocks=10)
    decision = choose(short, replica("roomy", num_running=3))
    assert decision.replica_id == "roomy"
    assert decision.candidates[0].terms_s["memory"] == pytest.approx((1024 - 160) / 4000)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "other"}, "other model"),
        ({"draining": True}, "draining"),
        ({"breaker_open": True}, "breaker open"),
        ({"max_model_len": 1024}, TOO_LONG),
        ({"num_blocks": 64}, TOO_LONG),
    ],
)
def test_a_replica_that_cannot_take_the_request_is_never_chosen(changes: dict[str, object], reason: str) -> None:
    bad = replica("bad", **changes)
    for spec in POLICIES.values():
        policy = spec.decide
        decision = policy(request(), Snapshot((bad, replica("good", num_running=30)), {"bad": 16}))
        assert decision.replica_id == "good"
        assert {c.replica_id: c.filtered for c in decision.candidates} == {"bad": reason, "good": None}
        alone = policy(request(), Snapshot((bad,)))
        assert alone.replica_id is None
        assert alone.winner is None
        assert alone.candidates[0].filtered == reason
        assert policy(request(), Snapshot(())).replica_id is None


def test_an_adapter_needs_a_replica_with_adapters() -> None:
    able = replica("able", max_adapters=4, num_running=30)
    decision = choose(replica("plain"), able, asked=request(adapter="a@1"))
    assert decision.replica_id == "able"


def test_a_replica_that_failed_this_request_is_excluded() -> None:
    assert choose(replica("a"), replica("b"), asked=request(excluded=frozenset({"a"}))).replica_id == "b"


def test_a_full_replica_is_chosen_only_when_all_are_full() -> None:
    full = replica("full", full=True)
    assert choose(full, replica("free", num_running=30, num_waiting_tokens=9999, num_waiting=1)).replica_id == "free"
    assert choose(full, matched={}).replica_id == "full"


def test_equals_are_decided_by_the_first_block_so_every_ingress_picks_the_same() -> None:
    replicas = [replica(f"r{i}") for i in range(8)]
    winners = set()
    for seed in range(200):
        hashes = (seed * 2654435761, *range(15))
        first = choose(*replicas, asked=request(request_id="x", block_hashes=hashes)).replica_id
        again = choose(*reversed(replicas), asked=request(request_id="y", block_hashes=hashes)).replica_id
        assert first == again
        winners.add(first)
    assert len(winners) == 8


def test_when_a_replica_dies_only_its_own_prefixes_move() -> None:
    replicas = [replica(f"r{i}") for i in range(5)]
    for seed in range(100):
        asked = request(block_hashes=(seed * 2654435761,))
        before = choose(*replicas, asked=asked).replica_id
        after = choose(*(r for r in replicas if r.replica_id != "r2"), asked=asked).replica_id
        assert after == before or before == "r2"


def test_short_prompts_without_a_block_spread_over_equals() -> None:
    chosen = [choose(*map(replica, "abcd"), asked=request(20, request_id=f"id{i}")).replica_id for i in range(100)]
    assert {c: chosen.count(c) > 10 for c in "abcd"} == dict.fromkeys("abcd", True)


def test_a_decision_explains_every_candidate_in_seconds() -> None:
    decision = choose(
        replica("a", num_running=5, num_waiting=1, num_waiting_tokens=400), replica("b"), matched={"a": 4}
    )
    a = next(c for c in decision.candidates if c.replica_id == "a")
    assert a.terms_s["queue"] == pytest.approx(400 / 4000)
    assert a.terms_s["prefill"] == pytest.approx((1024 - 256) / 4000)
    assert a.terms_s["decode"] == pytest.approx(0.02 * (1 + (400 + 768) // 512))
    assert a.cost_s == pytest.approx(sum(a.terms_s.values()))


def test_a_fully_cached_prompt_still_computes_its_last_token() -> None:
    decision = choose(replica("a"), matched={"a": 16})
    assert decision.winner is not None
    assert decision.winner.matched_tokens == 1023


def shortest(replica_id: str, *sizes: int, **changes: object) -> ReplicaState:
    """A replica that prefills the shortest first, with prompts of these sizes pending."""
    waiting = {"pending": pending_of(merged((), sizes)), "num_waiting": len(sizes), "num_waiting_tokens": sum(sizes)}
    return replica(replica_id, prefill_order="shortest", **(waiting | changes))


def test_where_the_shortest_goes_first_only_shorter_ones_are_waited_for() -> None:
    long_queue, short_queue = shortest("long", 4000), shortest("short", *[500] * 4)
    by_id = {c.replica_id: c.terms_s for c in choose(long_queue, short_queue, asked=request(600)).candidates}
    assert by_id["short"]["queue"] == pytest.approx(2000 / 4000)
    assert by_id["long"]["queue"] < 0.2 * by_id["short"]["queue"], "4,000 pending tokens, but a short prompt goes first"
    first_come = choose(replica("a", num_waiting=1, num_waiting_tokens=4000), asked=request(600))
    assert first_come.candidates[0].terms_s["queue"] == pytest.approx(1.0)


def test_those_it_goes_before_are_harmed() -> None:
    asked = request(600)
    alone, before = (choose(shortest("a", *sizes), asked=asked) for sizes in ((), (4000, 4000, 4000)))
    assert before.candidates[0].terms_s["harm"] > 1.3 * alone.candidates[0].terms_s["harm"]
    assert choose(shortest("busy", 4000, 4000, 4000), shortest("idle"), asked=asked).replica_id == "idle"


def test_the_adapters_load_is_seconds_like_any_other() -> None:
    asked = request(256, adapter="a@1")
    resident = replica("resident", max_adapters=4, adapters=("a@1",), adapter_load_s=0.4)
    loading = replica("loading", max_adapters=4, loading=(("a@1", 0.1),), adapter_load_s=0.4)
    without = replica("without", max_adapters=4, adapter_load_s=0.4)
    seconds = {c.replica_id: c.terms_s["adapter"] for c in choose(resident, loading, without, asked=asked).candidates}
    assert seconds == {"resident": 0.0, "loading": pytest.approx(0.1), "without": pytest.approx(0.4)}
    assert choose(loading, without, asked=asked).replica_id == "loading"
    busy = msgspec.structs.replace(resident, num_waiting=9, num_waiting_tokens=9000)
    assert choose(busy, without, asked=asked).replica_id == "without", "waiting there costs more than a load"


def test_round_robin_takes_turns_over_those_that_can() -> None:
    replicas = (replica("c"), replica("a"), replica("d", draining=True), replica("b"))
    chosen = [round_robin(request(), Snapshot(replicas, turn=turn)).replica_id for turn in range(6)]
    assert chosen == ["a", "b", "c", "a", "b", "c"]


def test_random_follows_the_draw_it_is_given() -> None:
    replicas = tuple(map(replica, "abcd"))
    chosen = [random(request(), Snapshot(replicas, draw=draw)).replica_id for draw in (0.0, 0.3, 0.6, 0.999999)]
    assert chosen == ["a", "b", "c", "d"]


def test_every_policy_of_the_profile_exists() -> None:
    names = msgspec.json.schema(RoutingConfig)["$defs"]["RoutingConfig"]["properties"]["policy"]["enum"]
    assert set(names) == set(POLICIES)
