"""The benchmark of a decision decides what an ingress would, and its parts are the whole."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from ops.bench.decision import ADAPTERS, IDLE, OURS, P50, P99, RIVALS, SETTINGS, SHORTEST, run, side_name
from ops.bench.decision_world import PROMPT_TOKENS, SYSTEM_TOKENS, DecisionWorld, Size
from ops.bench.harness import Plan

SMALL = Size(num_replicas=4, kv_tokens=200_000, num_adapters=12, num_slots=3, num_conversations=8)


@pytest.fixture
async def world() -> AsyncIterator[DecisionWorld]:
    made = DecisionWorld(SMALL)
    await made.start()
    yield made
    await made.close()


async def test_an_idle_fleet_takes_a_conversation_where_most_of_it_is_held(world: DecisionWorld) -> None:
    jobs, router = world.set(IDLE), world.router(OURS)
    num_warmest, num_blocks = 0, PROMPT_TOKENS // 64
    for job in jobs:
        request = router.request(job)
        matched = world.index.match(request.block_hashes)
        assert len(request.block_hashes) == num_blocks
        winner = router.decide(request).winner
        assert winner is not None
        num_warmest += winner.matched_tokens == 64 * max(matched.values(), default=0) > SYSTEM_TOKENS
    assert num_warmest > len(jobs) // 2, "where another wins, it prefills faster"
    assert all(world.index.num_held(link.replica_id) >= SMALL.num_blocks for link in world.links)
    assert not any(world.index.may_have_gaps(link.replica_id) for link in world.links)


async def test_busy_replicas_push_pending_prompts_and_adapters(world: DecisionWorld) -> None:
    jobs = world.set(ADAPTERS)
    states = world.fleet.states("m")
    assert {len(state.adapters) for state in states} == {SMALL.num_slots}
    assert {state.prefill_order for state in states} == {"shortest"}
    assert all(state.num_waiting_tokens == state.pending.tokens[-1] for state in states)
    assert any(state.num_waiting for state in states)
    assert all(job.adapter for job in jobs)
    decision = world.router(OURS).decide(world.router(OURS).request(jobs[0]))
    assert all(len(candidate.seconds) == 9 for candidate in decision.candidates)


async def test_every_side_is_measured_and_the_goals_are_ours() -> None:
    report = await run(SMALL, 30, Plan(1, 0), lambda words: None)
    sides = report.samples.by_side
    assert list(sides) == [side_name(policy, scene) for policy, scene in SETTINGS]
    for (sample,) in sides.values():
        assert 0 < max(sample["hash µs"], sample["match µs"]) < sample[P50] <= sample[P99]
        assert min(sample["of which policy µs"], sample["of which snapshot µs"]) > 0
    with_goal = [ratio.side for ratio in report.ratios if ratio.goal is not None]
    assert with_goal == 2 * [side_name(policy, scene) for policy, scene in SETTINGS if policy == OURS]
    assert [r.against for r in report.ratios if r.goal is None] == [side_name(rival, SHORTEST) for rival in RIVALS]
