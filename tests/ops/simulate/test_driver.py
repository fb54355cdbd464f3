"""Whole simulations: sessions, staleness, late binding, fairness, every policy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ops.simulate.binding import Binder, Bound, in_fair_order
from ops.simulate.driver import run
from ops.simulate.errors import SimulationError
from ops.simulate.fleet import FleetSpec
from ops.simulate.replica import ReplicaSpec
from ops.simulate.result import Result
from ops.simulate.trace import Trace, TraceRequest
from ops.simulate.variants import AdapterMix, repeated, with_adapters, with_tenants
from routing.policies import POLICIES, PolicySpec
from routing.types import Candidate, Decision, RouteRequest, Snapshot
from tests.ops.simulate.making import conversations, sessions, unique_prompts

REPLICA = ReplicaSpec(kv_tokens=20_000, max_num_batched_tokens=256)
FLEET = FleetSpec(num_replicas=3, replica=REPLICA)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fleet", [FLEET, replace(FLEET, events_delay_s=None, stats_delay_s=0.2, num_ingresses=2)])
def test_every_policy_answers_every_request_however_little_it_knows(policy: str, fleet: FleetSpec) -> None:
    trace = conversations(150, 20.0)
    result = run(trace, policy, fleet, load=0.6)
    assert len(result.ttfts_s) == 150 and min(result.ttfts_s) > 0
    assert all(end >= arrival + ttft for arrival, ttft, end in zip(
        result.arrivals_s, result.ttfts_s, result.ends_s, strict=True))  # fmt: skip
    assert set(result.replicas) == {0, 1, 2}
    assert 0 < result.summary["hit_ratio"] < 1
    assert result.summary["busy"] <= 1


def test_an_unknown_policy_is_refused_with_those_there_are() -> None:
    with pytest.raises(SimulationError, match=r"no policy 'best': there are .*round_robin"):
        run(conversations(5, 1.0), "best", FLEET, 0.5)


@pytest.mark.parametrize("policy", ["random", "power_of_two", "warm"])
def test_the_same_seed_gives_the_same_result_and_another_seed_another(policy: str) -> None:
    trace = conversations(120, 20.0)
    first, again = run(trace, policy, FLEET, 0.9), run(trace, policy, FLEET, 0.9)
    assert (first.ttfts_s, first.replicas, first.summary) == (again.ttfts_s, again.replicas, again.summary)
    if policy == "random":
        assert run(trace, policy, replace(FLEET, seed=1), 0.9).replicas != first.replicas


def test_load_is_prompt_tokens_over_what_the_fleet_prefills_while_they_arrive() -> None:
    trace = conversations(200, 10.0)
    arrivals = trace.arrivals(0.5, 1000.0)
    assert max(arrivals) == pytest.approx(trace.num_prompt_tokens / 500.0)
    twice = trace.arrivals(1.0, 1000.0)
    assert twice[7] == pytest.approx(arrivals[7] / 2)


def test_a_turn_comes_its_pause_after_the_answer_before_it() -> None:
    trace = sessions(num=5, num_turns=4, think_s=3.0)
    result = run(trace, "warm", FLEET, load=0.3)
    for index, request in enumerate(trace.requests):
        if request.after is not None:
            assert result.arrivals_s[index] == pytest.approx(result.ends_s[request.after] + 3.0, abs=1e-9)


def test_sessions_find_their_prompts_where_they_were() -> None:
    trace = sessions(num=10, num_turns=6, think_s=3.0)
    warm = run(trace, "warm", FLEET, load=0.3)
    blind = run(trace, "round_robin", FLEET, load=0.3)
    # Each turn has all but its last 4 blocks and 3 tokens from the turn before.
    expected = sum(4 * 16 * t for t in range(6)) * 10 / trace.num_prompt_tokens
    assert warm.summary["hit_ratio"] == pytest.approx(expected, rel=1e-6)
    assert blind.summary["hit_ratio"] < warm.summary["hit_ratio"]


def to_the_warmest(request: RouteRequest, snapshot: Snapshot) -> Decision:
    """Follows the index alone, and says what it believed."""
    found = snapshot.matched_blocks
    best = max(snapshot.replicas, key=lambda r: (found.get(r.replica_id, 0), -r.num_running, r.replica_id))
    candidate = Candidate(best.replica_id, found.get(best.replica_id, 0) * request.block_tokens)
    return Decision(request.request_id, "warmest", best.replica_id, (candidate,))


WARMEST = PolicySpec("warmest", to_the_warmest, "events", "test")


def shared_prompt(*arrivals_s: float) -> Trace:
    """Ever the same long prompt."""
    return Trace("same", 16, tuple(TraceRequest(at, 1600, 2, tuple(range(100))) for at in arrivals_s))


def played(trace: Trace, fleet: FleetSpec, policy: PolicySpec = WARMEST) -> Result:
    """At trace time as it stands."""
    return run(trace, policy, fleet, trace.num_prompt_tokens / (fleet.tokens_per_s * trace.duration_s))


def test_what_another_ingress_sent_is_known_when_its_events_have_come() -> None:
    trace = shared_prompt(0.0, 3.0)
    soon = played(trace, FleetSpec(2, REPLICA, num_ingresses=2, events_delay_s=0.5))
    late = played(trace, FleetSpec(2, REPLICA, num_ingresses=2, events_delay_s=5.0))
    assert soon.replicas[0] == soon.replicas[1] and soon.num_cached == (0, 1599)
    assert late.num_cached[1] in (0, 1599)
    seen: list[Snapshot] = []

    def watched(request: RouteRequest, snapshot: Snapshot) -> Decision:
        seen.append(snapshot)
        return to_the_warmest(request, snapshot)

    for delay_s, known in ((0.5, {"r1": 100}), (5.0, {}), (None, {})):
        seen.clear()
        spec = PolicySpec("watched", watched, "events", "test")
        played(trace, FleetSpec(2, REPLICA, num_ingresses=2, events_delay_s=delay_s), spec)
        assert seen[1].matched_blocks == known, f"{delay_s=}"


def test_what_an_ingress_sent_itself_is_expected_before_any_event() -> None:
    burst = shared_prompt(0.0, 0.02, 0.04, 0.9)
    result = played(burst, FleetSpec(3, REPLICA, events_delay_s=0.5))
    assert len(set(result.replicas)) == 1, "a burst with one new prefix stays together"


def test_without_any_events_an_ingress_remembers_what_it_sent() -> None:
    result = played(shared_prompt(0.0, 9.0, 18.0), FleetSpec(3, REPLICA, events_delay_s=None))
    assert len(set(result.replicas)) == 1 and result.num_cached == (0, 1599, 1599)


def test_evictions_are_told_too() -> None:
    """Ten long prompts push the first out: the index must not believe in it any more."""
    requests = [TraceRequest(2.0 * i, 1600, 2, tuple(range(1000 * i, 1000 * i + 100))) for i in range(10)]
    trace = Trace("many", 16, (*requests, TraceRequest(25.0, 1600, 2, requests[0].blocks)))
    seen: list[Snapshot] = []

    def watched(request: RouteRequest, snapshot: Snapshot) -> Decision:
        seen.append(snapshot)
        return to_the_warmest(request, snapshot)

    small = replace(REPLICA, kv_tokens=8000)
    played(trace, FleetSpec(1, small), PolicySpec("watched", watched, "events", "test"))
    assert seen[-1].matched_blocks.get("r0", 0) == 0
    seen.clear()
    played(trace, FleetSpec(1, replace(REPLICA, kv_tokens=40_000)), PolicySpec("watched", watched, "events", "test"))
    assert seen[-1].matched_blocks == {"r0": 100}


def test_stale_state_makes_routing_worse() -> None:
    trace = unique_prompts([0.05 * i for i in range(400)], 1500)
    fresh = run(trace, "warm", FLEET, load=0.85)
    stale = run(trace, "warm", replace(FLEET, stats_delay_s=2.0), load=0.85)
    assert stale.summary["ttft_mean_s"] > 1.1 * fresh.summary["ttft_mean_s"]


def test_late_binding_keeps_requests_in_the_ingress_until_a_replica_has_a_place() -> None:
    """With two places and one ahead at each of three replicas, nine run or wait there; the others wait in the queue."""
    fleet = FleetSpec(3, replace(REPLICA, max_num_seqs=2), max_ahead=1)
    trace = Trace("many", 64, tuple(TraceRequest(0.01 * i, 600, 400) for i in range(60)))
    most = 0
    num_waiting = []

    def watched(binder: Binder) -> Bound | None:
        nonlocal most
        most = max(most, *(s.num_running + s.num_waiting for s in binder.states()))
        num_waiting.append(len(binder.queue))
        return in_fair_order(binder)

    result = run(trace, "least_outstanding", replace(fleet, binding=watched), load=5.0)
    assert len(result.ttfts_s) == 60 and all(end > 0 for end in result.ends_s)
    assert most <= 3 and max(num_waiting) > 30
    early = run(trace, "least_outstanding", replace(fleet, max_ahead=None), load=5.0)
    assert early.summary["duration_s"] == pytest.approx(result.summary["duration_s"], rel=0.1)


def test_a_binding_of_ones_own_may_take_them_in_another_order() -> None:
    fleet = FleetSpec(1, replace(REPLICA, max_num_seqs=1), max_ahead=1)
    trace = Trace("mixed", 64, tuple(TraceRequest(0.001 * i, 1000 if i % 2 else 100, 2) for i in range(20)))

    def shortest_first(binder: Binder) -> Bound | None:
        if not binder.has_place() or not binder.queue:
            return None
        waiting = min(binder.queue, key=lambda w: (w.num_uncached, w.index))
        before = [binder.queue.pop() for _ in range(len(binder.queue))]
        charge = next(c for w, c in before if w is waiting)
        for other, other_charge in before:
            if other is not waiting:
                binder.queue.settle(other_charge, 0, 0)
                binder.queue.push(other)
        return Bound(waiting, charge, binder.decide(waiting.route))

    result = run(trace, "round_robin", replace(fleet, binding=shortest_first), load=50.0)
    ends = sorted(range(20), key=lambda i: result.ends_s[i])
    assert all(i % 2 == 0 for i in ends[2:10]), f"{ends}: the short ones first"


def test_one_tenants_flood_does_not_starve_another_behind_late_binding() -> None:
    flood = [TraceRequest(0.001 * i, 800, 20, tenant="flood") for i in range(200)]
    few = [TraceRequest(1.0 + 0.5 * i, 800, 20, tenant="few") for i in range(10)]
    trace = Trace("two", 64, tuple(sorted((*flood, *few), key=lambda r: r.arrival_s)))
    fleet = FleetSpec(1, replace(REPLICA, max_num_seqs=4), max_ahead=1)
    result = played(trace, fleet, POLICIES["round_robin"])
    at_once = played(trace, replace(fleet, max_ahead=None), POLICIES["round_robin"])
    of_few = [i for i, r in enumerate(trace.requests) if r.tenant == "few"]
    assert max(result.ttfts_s[i] for i in of_few) < 0.2 * max(at_once.ttfts_s[i] for i in of_few)


def test_adapters_are_loaded_kept_and_separate_prefixes() -> None:
    plain = conversations(200, 10.0)
    trace = with_adapters(plain, AdapterMix(12, zipf=1.0, ranks=(4, 8)))
    assert {r.adapter_rank for r in trace.requests} == {4, 8}
    root = [r.blocks[0] for r in trace.requests]
    assert len(set(root)) == len({r.adapter for r in trace.requests}), "the system prompt is another one under each"
    fleet = FleetSpec(2, replace(REPLICA, max_adapters=4))
    result = run(trace, "warm", fleet, load=0.4)
    assert 12 <= result.summary["adapter_loads"] < 200
    assert result.summary["swap_rate"] == result.summary["adapter_loads"] / 200
    ample = run(trace, "warm", FleetSpec(2, replace(REPLICA, max_adapters=16)), load=0.4)
    assert ample.summary["adapter_loads"] < result.summary["adapter_loads"]


def test_turns_of_one_conversation_keep_their_adapter_and_tenant() -> None:
    chats = sessions(num=8, num_turns=3, think_s=1.0)
    for request in with_adapters(chats, AdapterMix(5)).requests:
        assert request.adapter is not None
    tenants = with_tenants(chats, 5)
    for request in tenants.requests:
        if request.after is not None:
            assert request.tenant == tenants.requests[request.after].tenant
    assert len({r.tenant for r in tenants.requests}) > 1
    assert [r.blocks for r in tenants.requests] == [r.blocks for r in chats.requests]


def test_a_trace_repeated_comes_again_with_other_prompts() -> None:
    trace = sessions(num=3, num_turns=2, think_s=1.0)
    twice = repeated(trace, 2)
    assert len(twice.requests) == 12 and twice.num_prompt_tokens == 2 * trace.num_prompt_tokens
    assert twice.requests[3].after == 0 and twice.requests[9].after == 6
    first, second = ({b for r in part for b in r.blocks} for part in (twice.requests[:6], twice.requests[6:]))
    assert not first & second
    assert min(r.arrival_s for r in twice.requests[6:9]) > max(r.arrival_s for r in twice.requests[:3])
