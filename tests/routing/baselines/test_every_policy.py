"""What holds for every policy of the table, whatever the fleet looks like."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from routing.policies import POLICIES, UNBOUNDED_TOKENS
from routing.policy import unfit
from routing.types import ReplicaState, RouteRequest, Snapshot
from tests.routing.baselines.cases import replica, request

IDS = [f"r{i}" for i in range(6)]

states = st.builds(
    replica,
    st.sampled_from(IDS),
    st.integers(0, 300),
    num_waiting=st.integers(0, 50),
    num_waiting_tokens=st.integers(0, 100_000),
    num_sent=st.integers(0, 50),
    num_sent_tokens=st.integers(0, 100_000),
    num_free_blocks=st.integers(0, 10_000),
    prefill_tokens_per_s=st.sampled_from([0.0, 500.0, 8000.0]),
    model=st.sampled_from(["m", "m", "m", "other"]),
    draining=st.booleans(),
    breaker_open=st.sampled_from([False, False, True]),
    full=st.booleans(),
    max_adapters=st.sampled_from([0, 8]),
)
blocks = st.dictionaries(st.sampled_from(IDS), st.integers(1, 16))
snapshots = st.builds(
    lambda fleet, matched, held, turn, draw: Snapshot(tuple(fleet), matched, turn, draw, held),
    st.lists(states, max_size=6, unique_by=lambda r: r.replica_id),
    blocks,
    blocks,
    st.integers(0, 1000),
    st.floats(0, 1, exclude_max=True),
)
requests = st.builds(
    request,
    st.sampled_from([10, 64, 1024]),
    adapter=st.sampled_from([None, "a@1"]),
    excluded=st.frozensets(st.sampled_from(IDS), max_size=3),
)


@given(requests, snapshots)
def test_never_picks_one_that_cannot_take_it_and_always_one_that_can(asked: RouteRequest, seen: Snapshot) -> None:
    fit = {r.replica_id for r in seen.replicas if unfit(asked, r) is None}
    roomy = {r.replica_id for r in seen.replicas if r.replica_id in fit and not r.full}
    for spec in POLICIES.values():
        decision = spec.decide(asked, seen)
        assert decision.policy == spec.name
        assert {c.replica_id for c in decision.candidates} == {r.replica_id for r in seen.replicas}
        assert decision.reason
        if fit:
            assert decision.replica_id in (roomy or fit)
            assert decision.winner is not None and decision.winner.filtered is None
        else:
            assert decision.replica_id is None
            assert all(c.filtered for c in decision.candidates)


@given(requests, snapshots)
def test_same_snapshot_same_decision_in_whatever_order_the_replicas_come(asked: RouteRequest, seen: Snapshot) -> None:
    reversed_ = msgspec.structs.replace(seen, replicas=seen.replicas[::-1])
    for spec in POLICIES.values():
        chosen = spec.decide(asked, seen).replica_id
        assert spec.decide(asked, seen).replica_id == chosen
        assert spec.decide(asked, reversed_).replica_id == chosen


@given(requests, snapshots, states)
def test_a_lone_candidate_is_taken(asked: RouteRequest, seen: Snapshot, only: ReplicaState) -> None:
    only = msgspec.structs.replace(only, model="m", draining=False, breaker_open=False, max_adapters=8)
    asked = msgspec.structs.replace(asked, excluded=frozenset())
    alone = msgspec.structs.replace(seen, replicas=(only,))
    for spec in POLICIES.values():
        assert spec.decide(asked, alone).replica_id == only.replica_id


@given(requests, snapshots)
def test_the_matched_tokens_of_a_decision_are_those_of_the_snapshot(asked: RouteRequest, seen: Snapshot) -> None:
    for spec in POLICIES.values():
        for candidate in spec.decide(asked, seen).candidates:
            if candidate.filtered is None:
                num_blocks = seen.matched_blocks.get(candidate.replica_id, 0)
                assert candidate.matched_tokens == min(num_blocks * 64, asked.num_prompt_tokens - 1)


def test_the_table_names_every_policy_as_the_policy_names_itself() -> None:
    assert all(name == spec.name for name, spec in POLICIES.items())


def test_a_mirror_is_as_large_as_the_rules_own_tree_or_as_the_replicas_cache() -> None:
    assert POLICIES["cache_aware"].mirror_blocks(64, 512_000) == 2**25 // 4 // 64
    assert POLICIES["prefix_affinity"].mirror_blocks(64, 512_000) == UNBOUNDED_TOKENS // 64
    assert POLICIES["overlap_cost"].mirror_blocks(64, 512_000) == 8_000
