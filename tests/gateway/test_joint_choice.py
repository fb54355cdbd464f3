"""Request and replica chosen together, through the fleet, its links and the dispatcher."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from gateway.matching import JointChoice
from gateway.types import Job
from replicas.contract import pack_tokens
from tests.gateway.links import ScriptedLink, World, job, settle

WANTS = {"wanted_tokens": 512, "num_places": 8, "prefill_tokens_per_s": 1000.0}


async def begin(world: World, *jobs: Job) -> list[asyncio.Task[None]]:
    """Each asks, and takes its first delta."""

    async def ask(one: Job) -> None:
        stream = world.dispatcher.generate(one)
        try:
            await stream.first()
        finally:
            await stream.aclose()

    tasks = [asyncio.create_task(ask(one)) for one in jobs]
    await settle()
    return tasks


async def finish(world: World, tasks: list[asyncio.Task[None]], *links: ScriptedLink) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await settle()
    for state in world.fleet.states("m"):
        assert state.num_sent == 0 and state.num_sent_tokens == 0, "a place is still counted"
    await world.close()


async def test_a_replica_is_sent_what_it_wants_and_no_more() -> None:
    world = World()
    (a,) = await world.replicas("a")
    a.push(**WANTS | {"num_places": 3})
    tasks = await begin(world, *(job(request_id=f"r{i}", num_tokens=8) for i in range(10)))
    assert len(a.sources) == 3 and world.admission.num_waiting == 7
    a.num_counted = a.num_opened
    a.push(**WANTS | {"num_places": 2})
    await settle()
    assert len(a.sources) == 5 and world.admission.num_waiting == 5
    await finish(world, tasks, a)


async def test_tokens_on_their_way_count_as_pending() -> None:
    """Two prompts of 400 tokens: the first leaves less than 512 wanted, the second more than enough."""
    world = World()
    (a,) = await world.replicas("a")
    a.push(**WANTS)
    tasks = await begin(
        world, *(replace(job(f"r{i}"), prompt=pack_tokens(range(500 * i, 500 * i + 400))) for i in range(6))
    )
    assert len(a.sources) == 2 and world.admission.num_waiting == 4
    await finish(world, tasks, a)


async def test_a_client_that_leaves_between_its_ticket_and_its_replica_keeps_no_place() -> None:
    world = World()
    (a,) = await world.replicas("a")
    tasks = await begin(world, *(job(request_id=f"r{i}") for i in range(3)))
    a.push(**WANTS | {"num_places": 1})
    for task in tasks:
        task.cancel()
    await settle()
    await finish(world, tasks, a)


async def test_a_lost_replica_gives_its_places_back() -> None:
    world = World()
    a, b = await world.replicas("a", "b")
    for link in (a, b):
        link.push(**WANTS | {"num_places": 1})
    tasks = await begin(world, *(job(request_id=f"r{i}", num_tokens=8) for i in range(4)))
    assert (len(a.sources), len(b.sources)) == (1, 1)
    a.lose()
    await settle()
    await finish(world, tasks, b)


async def test_a_deadline_that_can_be_met_takes_the_handicap_of_a_long_prompt_away() -> None:
    world = World()
    (a,) = await world.replicas("a")
    a.push(**WANTS | {"num_places": 0})
    tasks = await begin(world, job(request_id="long", num_tokens=4000),
                        job(request_id="soon", num_tokens=4000, deadline=world.now + 5.0))  # fmt: skip
    assert isinstance(world.admission._matching, JointChoice)
    dues = {w.job.request_id: w.due for w in world.admission._lines["m"].queue}
    assert dues["soon"] <= world.now + 1.0 < dues["long"]
    await finish(world, tasks, a)
