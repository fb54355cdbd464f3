"""A rate that was measured in a bad moment does not keep work away for ever."""

from __future__ import annotations

import asyncio

import pytest

from gateway.rates import HALF_LIFE_S, relax, relaxed
from gateway.slot import Slot
from tests.gateway.links import ScriptedLink, World, member


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


def work(link: ScriptedLink, num_prompt_tokens: int, rate: float, step_s: float = 0.01) -> None:
    link.push(num_prompt_tokens=num_prompt_tokens, prefill_tokens_per_s=rate, step_time_s=step_s)


async def test_who_stands_idle_is_believed_to_be_like_those_at_work_until_it_works_again() -> None:
    world = World()
    slow, fast, other = await world.replicas("slow", "fast", "other")
    work(slow, 10, 100.0, 0.04)
    work(other, 10, 50.0)
    world.now = 2 * HALF_LIFE_S
    work(fast, 1000, 1600.0)
    relax(slots(world, {"slow": "g", "fast": "g", "other": "another"}))
    assert rates(world) == {"slow": (800, pytest.approx(0.0141, rel=0.01)), "fast": (1600, 0.01), "other": (50, 0.01)}
    slow.push(num_running=1)  # pushes without prompts say nothing new
    assert rates(world)["slow"][0] == 800
    work(slow, 500, 120.0, 0.05)
    assert rates(world)["slow"] == (120, 0.05)
    relax(slots(world, {"slow": "g", "fast": "g", "other": "another"}))
    assert rates(world)["slow"] == (120, 0.05)
    await world.close()


async def test_when_all_stand_idle_everybody_keeps_what_is_known() -> None:
    world = World()
    a, b = await world.replicas("a", "b")
    work(a, 10, 100.0)
    work(b, 10, 400.0)
    world.now = 100 * HALF_LIFE_S
    relax(slots(world, {"a": "g", "b": "g"}))
    assert rates(world) == {"a": (100, 0.01), "b": (400, 0.01)}
    await world.close()


async def test_the_fleet_looks_after_its_groups_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.rates.RELAX_EVERY_S", 0.01)
    world = World()
    await world.members(member("a"), member("b"))
    work(world.links["a"], 10, 100.0)
    world.now = 2 * HALF_LIFE_S
    work(world.links["b"], 1000, 1600.0)
    await asyncio.sleep(0.2)
    assert rates(world)["a"][0] == 800
    await world.close()
