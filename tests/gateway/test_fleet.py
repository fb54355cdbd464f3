"""Members in, states and places out."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from gateway.breaker import BREAKER_S, MAX_FAILURES
from gateway.compose import kv_sources
from gateway.slot import MIN_SENT_S
from replicas.channel import LinkLostError
from replicas.contract import GenerateRequest, SamplingParams
from routing.kv_follow import KvSource
from tests.gateway.links import FACTS, MODEL, World, member, settle


def request(request_id: str = "r") -> GenerateRequest:
    return GenerateRequest(request_id=request_id, prompt=bytes(400), sampling=SamplingParams(max_tokens=5, seed=0))


async def test_every_live_member_gets_a_link_and_is_a_candidate_of_its_model() -> None:
    world = World()
    await world.members(member("a"), member("b"), member("c", model="other"))
    assert {s.replica_id for s in world.fleet.states("m")} == {"a", "b"}
    assert {s.replica_id for s in world.fleet.states("other")} == {"c"}
    assert world.fleet.num_ready("m") == 2
    assert world.fleet.states("unknown") == ()
    await world.close()
    assert all(link.closed for link in world.links.values())


async def test_a_killed_replica_leaves_the_candidates_and_the_index_at_once_and_is_tried_again() -> None:
    world = World()
    (a, b) = await world.replicas("a", "b")
    for replica_id in "ab":
        world.fleet.index.insert(replica_id, [1, 2, 3])
    told: list[str] = []
    world.fleet.subscribe(told.append)
    a.lose()
    assert [s.replica_id for s in world.fleet.states("m")] == ["b"]  # no await in between
    assert world.fleet.index.match([1, 2, 3]) == {"b": 3}
    assert told == ["m"]
    assert world.fleet.num_ready("m") == 1
    with pytest.raises(LinkLostError):
        world.fleet.place("a", request(), 100)
    await asyncio.sleep(0.2)
    assert world.links["a"] is not a
    assert world.fleet.num_ready("m") == 2
    assert not b.closed
    await world.close()


async def test_an_unreachable_member_is_tried_ever_more_slowly() -> None:
    world = World()
    world.unreachable.add("a")
    await world.members(member("a"))
    await asyncio.sleep(0.3)
    assert 2 <= world.num_connects <= 4
    assert world.fleet.num_ready("m") == 0
    world.unreachable.clear()
    async with asyncio.timeout(2):
        await world.fleet.connected()
    assert world.fleet.num_ready("m") == 1
    await world.close()


async def test_a_member_that_withdraws_gets_nothing_new_but_finishes_what_it_has() -> None:
    world = World()
    (a,) = await world.replicas("a")
    placement = world.fleet.place("a", request(), 100)
    await world.members()
    assert world.fleet.num_ready("m") == 0
    assert world.fleet.num_free("m") == 0
    assert not a.closed
    placement.close()
    await settle()
    assert a.closed
    assert world.fleet.states("m") == ()
    await world.close()


async def test_a_member_that_comes_back_while_it_finishes_is_used_again() -> None:
    world = World()
    (a,) = await world.replicas("a")
    placement = world.fleet.place("a", request(), 100)
    await world.members()
    await world.replicas("a")
    assert world.fleet.num_ready("m") == 1
    world.fleet.index.insert("a", (1, 2))
    assert world.fleet.index.match((1, 2)) == {"a": 2}, "what it gets from now on is mirrored again"
    placement.close()
    await settle()
    assert not a.closed
    await world.close()


async def test_a_replica_started_anew_gets_a_new_link() -> None:
    world = World()
    (old,) = await world.replicas("a")
    placement = world.fleet.place("a", request(), 100)
    await world.members(member("a", epoch=2))
    assert old.closed
    assert world.links["a"] is not old
    placement.close()
    assert world.fleet.num_ready("m") == 1
    assert world.fleet.states("m")[0].num_sent == 0
    await world.close()


async def test_what_left_is_not_taken_for_another_start_that_comes_back() -> None:
    world = World()
    (old,) = await world.replicas("a")
    placement = world.fleet.place("a", request(), 100)
    await world.members()
    assert not old.closed, "its last request runs there"
    await world.members(member("a", epoch=2))
    assert old.closed and world.links["a"] is not old
    assert world.fleet.start_linked("a") == "a-2"
    placement.close()
    await world.close()


async def test_a_replica_publishes_while_its_word_and_its_link_agree_on_the_start() -> None:
    world = World()
    world.facts["a"] = msgspec.structs.replace(FACTS, events=True)
    (link,) = await world.replicas("a")
    link.push(kv_seq=3)
    (source,) = kv_sources(world.config, world.fleet)
    assert source == KvSource("a", 1, MODEL.route_block_tokens, 3, "a-1")
    link.start_id = "another"  # as after a loss, before its first word
    assert list(kv_sources(world.config, world.fleet)) == []
    await world.close()


async def test_a_link_that_leads_to_the_new_start_already_outlives_its_first_word() -> None:
    world = World()
    (old,) = await world.replicas("a")
    world.starts["a"] = member("a", epoch=2).start_id
    old.lose()
    async with asyncio.timeout(2.0):
        while not world.fleet.num_ready("m"):  # noqa: ASYNC110 its backoff is a matter of real time
            await asyncio.sleep(0.01)
    new = world.links["a"]
    assert new is not old
    placement = world.fleet.place("a", request(), 100)
    await world.members(member("a", epoch=2))
    assert not new.closed and world.fleet.links() == [(member("a", epoch=2), new)]
    assert world.fleet.start_linked("a") == "a-2" and world.fleet.start_linked("b") is None
    placement.close()
    await world.members(member("a", epoch=3))
    assert new.closed, "it led to the second start"
    await world.close()


async def test_places_are_the_running_capacity_and_a_few_that_wait() -> None:
    world = World(max_ahead_per_replica=2)
    (a,) = await world.replicas("a")
    assert world.fleet.num_free("m") == 4 + 2
    world.fleet.place("a", request(), 100)
    assert world.fleet.num_free("m") == 5
    a.push(num_running=3)
    assert world.fleet.num_free("m") == 2
    a.push(num_running=3, num_waiting=1)  # it lets one wait although a seat is free: it is at its capacity
    assert world.fleet.num_free("m") == 0
    assert world.fleet.states("m")[0].full
    a.push(num_running=0, num_waiting=0)
    a.push(draining=True)
    assert world.fleet.num_free("m") == 0
    await world.close()


async def test_what_was_sent_counts_until_the_pushed_state_must_contain_it() -> None:
    world = World()
    (a,) = await world.replicas("a")
    placement = world.fleet.place("a", request("r1"), 70)
    second = world.fleet.place("a", request("r2"), 30)

    def sent() -> tuple[int, int]:
        (state,) = world.fleet.states("m")
        return state.num_sent, state.num_sent_tokens

    assert sent() == (2, 100)
    a.push(num_waiting=1, num_waiting_tokens=70)
    assert sent() == (2, 100), "the first push may have crossed it"
    second.answered()
    assert sent() == (1, 70)
    a.push()
    assert sent() == (1, 70), "two pushes in a row may have lain in the socket"
    world.now += 2 * MIN_SENT_S
    a.push()
    assert sent() == (0, 0)
    placement.close()
    second.close()
    assert sent() == (0, 0)
    await world.close()


async def test_more_places_are_told_and_fewer_are_not() -> None:
    world = World()
    (a,) = await world.replicas("a")
    told: list[str] = []
    world.fleet.subscribe(told.append)
    a.push(num_running=4)
    assert told == []
    a.push(num_running=3)
    assert told == ["m"]
    a.push(num_steps=7)
    assert told == ["m"]
    await world.close()


async def test_a_replica_that_is_full_when_it_connects_is_heard_of() -> None:
    world = World()
    (a,) = await world.replicas("a")
    a.push(num_running=4, num_waiting=50)
    told: list[str] = []
    world.fleet.subscribe(told.append)
    a.push(draining=True)
    assert told == ["m"]
    a.push(draining=False)
    assert told == ["m", "m"]
    assert (world.fleet.num_ready("m"), world.fleet.num_free("m")) == (1, 0)
    await world.close()


async def test_repeated_failures_open_a_breaker_that_closes_by_itself() -> None:
    world = World()
    await world.replicas("a")
    for _ in range(MAX_FAILURES):
        placement = world.fleet.place("a", request(), 1)
        placement.failed()
        placement.close()
    assert world.fleet.num_ready("m") == 0
    assert world.fleet.num_free("m") == 0
    assert world.fleet.states("m")[0].breaker_open
    world.now += BREAKER_S
    assert world.fleet.num_ready("m") == 1
    world.fleet.place("a", request(), 1).close()  # any event looks again; the timer does it on a quiet fleet
    assert world.fleet.num_free("m") > 0
    assert not world.fleet.states("m")[0].breaker_open
    await world.close()


async def test_one_answer_makes_up_for_failures() -> None:
    world = World()
    await world.replicas("a")
    for _ in range(2 * MAX_FAILURES):
        placement = world.fleet.place("a", request(), 1)
        placement.failed()
        placement.answered()
        placement.close()
    assert world.fleet.num_ready("m") == 1
    await world.close()


async def test_facts_are_those_of_the_least_able_and_are_remembered() -> None:
    world = World()
    world.facts["a"] = msgspec.structs.replace(FACTS, max_model_len=1024, prompt_logprobs=True, num_blocks=8)
    world.facts["b"] = msgspec.structs.replace(FACTS, max_model_len=300, max_num_seqs=9)
    assert world.fleet.facts("m") is None
    (a, b) = await world.replicas("a", "b")
    facts = world.fleet.facts("m")
    assert facts is not None
    assert (facts.max_model_len, facts.prompt_logprobs, facts.max_num_seqs, facts.num_blocks) == (300, False, 4, 8)
    world.unreachable |= {"a", "b"}
    b.lose()
    assert (only_a := world.fleet.facts("m")) is not None
    assert (only_a.max_model_len, only_a.prompt_logprobs) == (1024, True)
    a.lose()
    assert world.fleet.facts("m") == only_a
    await world.close()


async def test_metrics_show_readiness_load_and_losses() -> None:
    world = World()
    (a,) = await world.replicas("a")
    placement = world.fleet.place("a", request(), 1)
    text = world.metrics.exposition().decode()
    assert 'warmgate_replicas_ready{model="m"} 1.0' in text
    assert 'warmgate_replica_outstanding_requests{replica="a"} 1.0' in text
    world.unreachable.add("a")
    a.lose()
    placement.close()
    await world.members()
    text = world.metrics.exposition().decode()
    assert 'warmgate_replicas_ready{model="m"} 0.0' in text
    assert "warmgate_replica_links_lost_total 1.0" in text
    assert 'replica="a"' not in text
    await world.close()
