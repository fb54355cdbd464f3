"""What an ingress knows of adapters beside what replicas say: what it asked for, and where they should live."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from gateway.asked import AskedAdapters
from gateway.homes import AdapterHomes
from replicas.contract import EngineStats
from routing.types import ReplicaState, RouteRequest
from tests.gateway.links import FACTS, World, job, settle
from tests.gateway.scripted import Clock


def asked(adapter: str | None = "a@1") -> RouteRequest:
    return RouteRequest("q", "m", adapter, (), 64, 100, 10)


def states(*replica_ids: str, **resident: tuple[str, ...]) -> tuple[ReplicaState, ...]:
    return tuple(ReplicaState(i, "m", 512, 4, adapters=resident.get(i, ()), max_adapters=4) for i in replica_ids)


def test_an_adapter_asked_for_counts_as_loading_until_the_replica_has_had_time_to_say_so() -> None:
    clock = Clock()
    known = AskedAdapters(clock)
    stats = EngineStats(adapters=("b@1",), loading=(("c@1", 0.7),), adapter_load_s=0.4, adapter_queue_s=0.1)
    for name in ("a@1", "c@1"):
        known.ask(name, 0)
    clock.now += 0.2
    assert known.resident(stats) == {"b@1"}
    assert dict(known.loading(stats)) == pytest.approx({"c@1": 0.7, "a@1": 0.3})
    known.heard(stats, 1)
    assert len(known.loading(stats)) == 2, "the first word may have crossed it"
    known.heard(stats, 2)
    assert known.loading(stats) == stats.loading, "it has failed, or the replica knows better"


def test_an_adapter_that_has_become_resident_is_no_longer_loading() -> None:
    known = AskedAdapters(Clock())
    known.ask("a@1", 0)
    there = EngineStats(adapters=("a@1",))
    assert known.loading(there) == () and known.resident(there) == {"a@1"}
    known.heard(there, 1)
    assert known.loading(EngineStats()) == ()
    known.resident(there)
    known.ask("a@1", 1)
    assert known.loading(EngineStats()) == (), "asking for a resident one loads nothing"


async def test_two_ingresses_send_an_unknown_adapter_to_the_same_home() -> None:
    fleet = states("r1", "r2", "r3", "r4")
    one, other = AdapterHomes(lambda model_id: fleet, Clock()), AdapterHomes(lambda model_id: fleet[::-1], Clock())
    found = {name: one.of(asked(name)) for name in (f"a{i}@1" for i in range(50))}
    assert found == {name: other.of(asked(name)) for name in found}
    assert all(len(at) == 1 for at in found.values()) and len(set(found.values())) == 4
    assert one.of(asked(None)) == ()


def test_an_adapter_nobody_placed_yet_goes_where_a_slot_is_free() -> None:
    full = ("b@1", "c@1", "d@1", "e@1")
    unlimited = AdapterHomes(lambda model_id: states("r1", "r2", "r3"), Clock())
    favourites = {name: unlimited.of(asked(name)) for name in (f"a{i}@1" for i in range(20))}
    crowded = AdapterHomes(lambda model_id: states("r1", "r2", "r3", r1=full, r2=full), Clock())
    assert {crowded.of(asked(name)) for name in favourites} == {("r3",)}
    packed = AdapterHomes(lambda model_id: states("r1", "r2", "r3", r1=full, r2=full, r3=full), Clock())
    assert {name: packed.of(asked(name)) for name in favourites} == favourites, "somebody has to make room"


async def test_homes_follow_demand_and_stay_where_the_adapter_lives() -> None:
    fleet = states("r1", "r2", "r3", "r4", r3=("hot@1",))
    homes = AdapterHomes(lambda model_id: fleet, Clock())
    for i in range(40):
        homes.placed(asked(f"a{i}@1"), 100)
    homes.placed(asked("hot@1"), 100)
    homes.refresh()
    assert homes.of(asked("hot@1")) == ("r3",)
    for _ in range(40):
        homes.placed(asked("hot@1"), 100)
    homes.refresh()
    assert homes.of(asked("hot@1"))[0] == "r3" and len(homes.of(asked("hot@1"))) >= 2
    for _ in range(4000):
        homes.placed(asked(None), 100)
    homes.refresh()
    assert homes.of(asked("hot@1")) == ("r3",), "beside all that the base model does, one home is enough"


async def test_homes_are_made_anew_beside_requests_and_only_while_there_is_demand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.homes.PLACE_EVERY_S", 0.02)
    homes = AdapterHomes(lambda model_id: states("r1", "r2"), Clock())
    homes.placed(asked(None), 100)
    assert homes._timer is None
    for _ in range(3):
        homes.placed(asked("a@1"), 100)
    assert homes._lines["m"].homes == {}
    await asyncio.sleep(0.05)
    assert len(homes._lines["m"].homes["a@1"]) == 2 and homes._timer is None


async def test_a_replica_that_leaves_is_nobody_s_home_after_the_next_placing() -> None:
    fleet = [states("r1", "r2", r1=("a@1",))]
    homes = AdapterHomes(lambda model_id: fleet[0], Clock())
    homes.placed(asked("a@1"), 100)
    for i in range(20):
        homes.placed(asked(f"b{i}@1"), 100)
    homes.refresh()
    assert homes.of(asked("a@1")) == ("r1",)
    fleet[0] = states("r2")
    homes.refresh()
    assert homes.of(asked("a@1")) == ("r2",)


@pytest.mark.parametrize("look_ahead", [0, 8])
@pytest.mark.parametrize(("num_free", "resident", "expected"), [(0, (), 1), (0, ("lora@1",), 0), (4, (), 0)])
async def test_a_request_that_must_wait_has_its_adapter_fetched_once_unless_somebody_has_it(
    num_free: int, resident: tuple[str, ...], expected: int, look_ahead: int
) -> None:
    world = World(max_ahead_per_replica=4, look_ahead=look_ahead)
    world.facts = {name: msgspec.structs.replace(FACTS, max_adapters=2) for name in "ab"}
    links = await world.replicas("a", "b")
    for link in links:
        link.push(num_waiting=4 - num_free, num_running=4, adapters=resident)
    asked = [job(f"r{i}", adapter="lora@1") for i in range(3)]
    streams = [world.dispatcher.generate(each) for each in (*asked, job("plain"))]
    tasks = [asyncio.create_task(stream.first()) for stream in streams]
    await settle()
    assert [name for link in links for name in link.prefetched] == ["lora@1"] * expected
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await world.close()


async def test_requests_that_wait_for_adapters_take_places_but_do_not_make_a_replica_full() -> None:
    world = World(max_ahead_per_replica=4)
    (link,) = await world.replicas("a")
    link.push(num_running=1, num_waiting=2, num_waiting_adapter=2)
    assert world.fleet.num_free("m") == (4 - 1 - 2) + 4
    link.push(num_running=1, num_waiting=3, num_waiting_adapter=2)
    assert world.fleet.num_free("m") == 3
    await world.close()
