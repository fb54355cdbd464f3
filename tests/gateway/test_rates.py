"""A rate that was measured in a bad moment does not keep work away for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.rates import HALF_LIFE_S, relax, relaxed
from gateway.slot import STEPS_TO_LEARN, Slot
from tests.gateway.links import ScriptedLink, World


@pytest.mark.parametrize(
    ("own", "peers", "idle_s", "expected"),
    [
        (100.0, (400.0,), 0.0, 100.0),
        (100.0, (400.0,), HALF_LIFE_S, 200.0),
        (100.0, (400.0, 100.0, 400.0), 1000 * HALF_LIFE_S, 400.0),
        (400.0, (100.0,), HALF_LIFE_S, 200.0),
        (100.0, (), 1000.0, 100.0),
        (100.0, (0.0,), 1000.0, 100.0),
        (0.0, (400.0,), 1000.0, 0.0),
    ],
)
def test_an_idle_replicas_rate_moves_to_its_groups(
    own: float, peers: tuple[float, ...], idle_s: float, expected: float
) -> None:
    assert relaxed(own, peers, idle_s) == pytest.approx(expected)


def rates(world: World) -> dict[str, tuple[float, float]]:
    return {s.replica_id: (round(s.prefill_tokens_per_s), s.step_time_s) for s in world.fleet.states("m")}


def slots(world: World, groups: dict[str, str]) -> list[tuple[str, Slot]]:
    return [(groups[slot.replica_id], slot) for _, slot in world.fleet._grouped()]


def idle(link: ScriptedLink, rate: float, step_s: float = 0.01, num_steps: int = 0) -> None:
    link.push(num_running=0, num_waiting=0, prefill_tokens_per_s=rate, step_time_s=step_s, num_steps=num_steps)


def busy(link: ScriptedLink, rate: float, step_s: float = 0.01) -> None:
    link.push(num_running=1, prefill_tokens_per_s=rate, step_time_s=step_s)


SAME = {"slow": "g", "fast": "g", "other": "another"}


async def test_who_stands_idle_is_believed_to_be_like_those_at_work_until_it_has_learnt_anew() -> None:
    world = World()
    slow, fast, other = await world.replicas("slow", "fast", "other")
    idle(slow, 100.0, 0.04, num_steps=50)
    idle(other, 50.0)
    world.now = 2 * HALF_LIFE_S
    busy(fast, 1600.0)
    relax(slots(world, SAME))
    assert rates(world) == {"slow": (800, pytest.approx(0.0141, rel=0.01)), "fast": (1600, 0.01), "other": (50, 0.01)}
    slow.push(num_running=1, num_steps=51, prefill_tokens_per_s=120.0)  # one chunk: an old mean, hardly moved
    relax(slots(world, SAME))
    assert rates(world)["slow"][0] == 800
    slow.push(num_running=1, num_steps=50 + STEPS_TO_LEARN, prefill_tokens_per_s=1100.0, step_time_s=0.02)
    assert rates(world)["slow"] == (1100, 0.02)
    await world.close()


async def test_who_is_at_work_is_taken_at_its_word_however_long_it_gets_nothing_new() -> None:
    world = World()
    slow, fast = await world.replicas("slow", "fast")
    busy(fast, 1600.0)
    for _ in range(10):
        world.now += HALF_LIFE_S
        slow.push(num_running=0, num_waiting=3, num_waiting_tokens=20_000, prefill_tokens_per_s=300.0)
        relax(slots(world, SAME))
        assert rates(world)["slow"][0] == 300
    await world.close()


async def test_when_all_stand_idle_everybody_keeps_what_is_known() -> None:
    world = World()
    a, b = await world.replicas("slow", "fast")
    idle(a, 100.0)
    idle(b, 400.0)
    world.now = 100 * HALF_LIFE_S
    relax(slots(world, SAME))
    assert rates(world) == {"slow": (100, 0.01), "fast": (400, 0.01)}
    await world.close()


async def test_a_new_connection_begins_with_what_the_replica_says(world: World) -> None:
    slow, fast = await world.replicas("slow", "fast")
    idle(slow, 100.0)
    world.now = 2 * HALF_LIFE_S
    busy(fast, 1600.0)
    relax(slots(world, SAME))
    assert rates(world)["slow"][0] == 800
    slow.lose()
    async with asyncio.timeout(2):
        await world.fleet.connected()
    idle(world.links["slow"], 100.0)
    assert rates(world)["slow"][0] == 100


async def test_the_fleet_looks_after_its_groups_by_itself(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.rates.RELAX_EVERY_S", 0.01)
    slow, fast = await world.replicas("slow", "fast")
    idle(slow, 100.0)
    world.now = 2 * HALF_LIFE_S
    busy(fast, 1600.0)
    relaxed_once = asyncio.Event()
    monkeypatch.setattr(Slot, "believe", lambda slot, *_rates: relaxed_once.set())
    async with asyncio.timeout(2):
        await relaxed_once.wait()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    await made.close()
