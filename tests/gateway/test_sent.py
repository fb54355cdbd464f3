"""Policies see what they read: a mirror of what was sent, the index of what is held, or nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

import msgspec
import pytest

from routing.types import Decision
from tests.gateway.links import World, job

Open: TypeAlias = Callable[..., Awaitable[World]]


@pytest.fixture
async def world() -> AsyncIterator[Open]:
    worlds: list[World] = []

    async def opened(policy: str, *replica_ids: str) -> World:
        made = World(policy)
        worlds.append(made)
        await made.replicas(*replica_ids)
        return made

    yield opened
    for made in worlds:
        await made.close()


def send(world: World, num_tokens: int = 256) -> Decision:
    """Routes a prompt of consecutive ids and counts it as sent."""
    asked = world.router.request(job(num_tokens=num_tokens))
    decision = world.router.decide(asked)
    world.router.placed(asked, decision)
    return decision


def matched(decision: Decision) -> dict[str, int]:
    return {c.replica_id: c.matched_tokens for c in decision.candidates}


@pytest.mark.parametrize("policy", ["cache_aware", "prefix_affinity"])
async def test_a_prompt_that_was_sent_matches_where_it_went(world: Open, policy: str) -> None:
    fleet = await world(policy, "a", "b")
    first = send(fleet)
    assert matched(first) == {"a": 0, "b": 0}
    assert first.replica_id is not None
    longer = send(fleet, 320)
    assert longer.replica_id == first.replica_id
    assert matched(longer)[first.replica_id] == 256
    assert sorted(matched(longer).values()) == [0, 256]


async def test_a_replica_that_was_sent_less_takes_a_prompt_that_nobody_knows(world: Open) -> None:
    fleet = await world("prefix_affinity", "a", "b", "c")
    asked = fleet.router.request(job(num_tokens=256))
    chosen = []
    for i in range(3):
        unknown = msgspec.structs.replace(asked, block_hashes=tuple(range(100 * i, 100 * i + 16)))
        decision = fleet.router.decide(unknown)
        fleet.router.placed(unknown, decision)
        chosen.append(decision.replica_id)
    assert sorted(map(str, chosen)) == ["a", "b", "c"]


async def test_a_replica_that_is_lost_comes_back_with_nothing_sent_to_it(world: Open) -> None:
    fleet = await world("cache_aware", "a")
    send(fleet)
    assert matched(send(fleet)) == {"a": 255}
    fleet.links["a"].lose()
    assert fleet.router.decide(fleet.router.request(job())).replica_id is None
    await fleet.members()
    await fleet.replicas("a")
    assert matched(send(fleet)) == {"a": 0}


async def test_a_policy_that_reads_nothing_is_told_nothing(world: Open) -> None:
    fleet = await world("least_outstanding", "a")
    send(fleet)
    assert matched(send(fleet)) == {"a": 0}


async def test_a_policy_that_reads_events_is_told_what_the_index_holds(world: Open) -> None:
    fleet = await world("greedy_ttft", "a", "b")
    asked = fleet.router.request(job(num_tokens=256))
    fleet.fleet.index.insert("b", asked.block_hashes[:2])
    assert matched(fleet.router.decide(asked)) == {"a": 0, "b": 32}
