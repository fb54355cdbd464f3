"""One job's way to a replica and its deltas' way back."""

from __future__ import annotations

import asyncio

import pytest

from gateway import dispatch as dispatch_module
from gateway import line as line_module
from gateway.dispatch import JobStream
from gateway.errors import (
    ApiError,
    ContextLengthError,
    DeadlineError,
    InternalError,
    QueueFullError,
    ReplicaLostError,
    UnavailableError,
)
from replicas.contract import StepDelta
from tests.gateway.deltas import each
from tests.gateway.links import ScriptedLink, ScriptedSource, World, job, settle


class Reader:
    """Reads a stream in a task, as a handler does."""

    def __init__(self, stream: JobStream) -> None:
        self.stream = stream
        self.deltas: list[StepDelta] = []
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for delta in each(self.stream):
                self.deltas.append(delta)
        finally:
            await self.stream.aclose()

    @property
    def token_ids(self) -> list[int]:
        return [t for delta in self.deltas for t in delta.token_ids]


async def begin(world: World, **changes: object) -> Reader:
    reader = Reader(world.dispatcher.generate(job(**changes)))  # type: ignore[arg-type]
    await settle()
    return reader


def at(*links: ScriptedLink) -> tuple[ScriptedLink, ScriptedSource]:
    """Where the newest attempt is."""
    link = max((li for li in links if li.sources), key=lambda li: li.sources[-1].request.attempt)
    return link, link.sources[-1]


def other(link: ScriptedLink, *links: ScriptedLink) -> ScriptedLink:
    return next(li for li in links if li is not link)


async def test_a_job_runs_to_its_end_and_gives_everything_back() -> None:
    world = World()
    (a,) = await world.replicas("a")
    reader = await begin(world, priority=3)
    (source,) = a.sources
    sent = source.request
    assert (sent.request_id, sent.attempt, sent.tenant, sent.priority, sent.salt) == ("r", 1, "t", 3, b"salt")
    source.say(1, 2, cached=48)
    source.say(3, finish="stop")
    await reader.task
    assert reader.token_ids == [1, 2, 3]
    assert (reader.stream.replica_id, reader.stream.num_attempts) == ("a", 1)
    assert not source.cancelled
    assert world.fleet.states("m")[0].num_sent == 0
    assert reader.stream.ready() == [] and reader.stream.over
    await world.close()


async def test_tenants_pay_for_what_was_served_not_for_the_estimate() -> None:
    world = World()
    (a,) = await world.replicas("a")
    reader = await begin(world)
    a.sources[0].say(1, cached=48)
    a.sources[0].say(2, 3, finish="length")
    await reader.task
    again = await begin(world, request_id="r2")
    assert a.sources[1].request.fair_tag == pytest.approx((64 - 48) + 2.0 * 3)
    a.sources[1].say(1, finish="stop")
    await again.task
    await world.close()


async def test_a_repeated_prompt_goes_where_it_is_warm() -> None:
    world = World()
    links = await world.replicas("a", "b", "c")
    chosen: set[str | None] = set()
    for i in range(4):
        reader = await begin(world, request_id=f"r{i}")
        source = next(s for link in links for s in link.sources if s.request.request_id == f"r{i}")
        source.say(1, finish="stop")
        await reader.task
        chosen.add(reader.stream.replica_id)
    decision = world.dispatcher.decision("r3")
    assert decision is not None
    assert chosen == {decision.replica_id}
    assert decision.winner is not None
    assert decision.winner.matched_tokens == 63
    assert world.dispatcher.decision("unknown") is None
    await world.close()


async def test_a_replica_lost_before_the_first_delta_is_not_noticed_by_the_client() -> None:
    world = World()
    links = await world.replicas("a", "b")
    reader = await begin(world)
    first, _ = at(*links)
    first.lose()
    await settle()
    second, source = at(*links)
    assert second is not first
    assert source.request.attempt == 2
    source.say(7, finish="stop")
    await reader.task
    assert reader.token_ids == [7]
    assert (reader.stream.replica_id, reader.stream.num_attempts) == (second.replica_id, 2)
    assert 'warmgate_retries_total{reason="lost"} 1.0' in world.metrics.exposition().decode()
    await world.close()


async def test_a_replica_lost_after_a_delta_is_an_error_at_once() -> None:
    world = World()
    links = await world.replicas("a", "b")
    reader = await begin(world)
    first, source = at(*links)
    source.say(1)
    await settle()
    first.lose()
    with pytest.raises(ReplicaLostError):
        await reader.task
    assert reader.token_ids == [1]
    assert not other(first, *links).sources
    await world.close()


@pytest.mark.parametrize("code", ["draining", "overloaded", "engine_dead", "upstream_lost"])
async def test_a_replica_that_refuses_is_passed_over(code: str) -> None:
    world = World()
    links = await world.replicas("a", "b")
    reader = await begin(world)
    first, source = at(*links)
    source.fault(code)
    await settle()
    second, source = at(*links)
    assert second is not first
    source.say(1, finish="stop")
    await reader.task
    assert reader.stream.num_attempts == 2
    decision = world.dispatcher.decision("r")
    assert decision is not None
    assert {c.replica_id: c.filtered for c in decision.candidates}[first.replica_id] == "failed this request"
    await world.close()


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("context_length_exceeded", ContextLengthError),
        ("internal", InternalError),
        ("deadline_exceeded", DeadlineError),
    ],
)
async def test_a_fault_that_would_come_anywhere_is_the_clients(code: str, error: type[ApiError]) -> None:
    world = World()
    links = await world.replicas("a", "b")
    reader = await begin(world)
    _, source = at(*links)
    source.fault(code)
    with pytest.raises(error):
        await reader.task
    assert sum(len(link.sources) for link in links) == 1
    await world.close()


@pytest.mark.parametrize("code", ["engine_dead", "upstream_lost"])
async def test_a_fault_in_the_middle_ends_the_answer(code: str) -> None:
    world = World()
    links = await world.replicas("a", "b")
    reader = await begin(world)
    _, source = at(*links)
    source.say(1)
    source.fault(code, retryable=True)
    with pytest.raises(ReplicaLostError):
        await reader.task
    assert reader.token_ids == [1]
    await world.close()


async def test_a_request_over_which_two_replicas_died_gets_no_third() -> None:
    world = World()
    links = await world.replicas("a", "b", "c")
    reader = await begin(world)
    at(*links)[0].lose()
    await settle()
    at(*links)[1].fault("engine_dead", retryable=True)
    with pytest.raises(ReplicaLostError):
        await reader.task
    assert sum(len(link.sources) for link in links) == 2
    await world.close()


async def test_attempts_are_bounded() -> None:
    world = World()
    links = await world.replicas("a", "b", "c", "d")
    reader = await begin(world)
    for _ in range(3):
        at(*links)[1].fault("overloaded", retryable=True)
        await settle()
    with pytest.raises(QueueFullError):
        await reader.task
    assert reader.stream.num_attempts == 3
    await world.close()


async def test_an_overload_with_nobody_else_is_said_at_once() -> None:
    world = World()
    (a,) = await world.replicas("a")
    reader = await begin(world)
    a.sources[0].fault("overloaded", retryable=True)
    with pytest.raises(QueueFullError) as refused:
        await reader.task
    assert refused.value.retry_after_s
    await world.close()


async def test_with_its_only_replica_lost_a_job_waits_for_the_replacement() -> None:
    world = World()
    (a,) = await world.replicas("a")
    reader = await begin(world)
    world.unreachable.add("a")
    a.lose()
    await settle()
    assert not reader.task.done()
    (b,) = await world.replicas("b")
    await settle()
    b.sources[0].say(5, finish="stop")
    await reader.task
    assert reader.token_ids == [5]
    await world.close()


async def test_without_a_replacement_the_client_is_told_when_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch_module, "NO_REPLICA_S", 0.05)
    world = World()
    world.now = asyncio.get_running_loop().time()
    world.clock = asyncio.get_running_loop().time  # type: ignore[method-assign]
    world.dispatcher.around = type(world.dispatcher.around)(world.clock, world.dispatcher.around.random, world.metrics)
    (a,) = await world.replicas("a")
    reader = await begin(world)
    world.unreachable.add("a")
    a.lose()
    with pytest.raises(UnavailableError) as refused:
        await reader.task
    assert refused.value.retry_after_s
    assert refused.value.message.endswith("The last one said: Replica a was lost before it answered.")
    await world.close()


async def test_a_job_for_a_model_without_replicas_starts_when_one_appears() -> None:
    world = World()
    reader = await begin(world)
    assert world.admission.num_waiting == 1
    (a,) = await world.replicas("a")
    await settle()
    a.sources[0].say(1, finish="stop")
    await reader.task
    await world.close()


async def test_a_job_for_a_model_without_replicas_is_refused_in_the_end() -> None:
    world = World()
    reader = await begin(world)
    world.now += line_module.NO_REPLICA_S
    world.admission.expire()
    with pytest.raises(UnavailableError) as refused:
        await reader.task
    assert refused.value.status == 503
    assert refused.value.retry_after_s
    await world.close()


async def test_closing_the_stream_cancels_at_the_replica_and_frees_the_place() -> None:
    world = World()
    (a,) = await world.replicas("a")
    for num_deltas in (0, 1):
        free = world.fleet.num_free("m")
        reader = await begin(world, request_id=f"r{num_deltas}")
        source = a.sources[-1]
        for _ in range(num_deltas):
            source.say(1)
        await settle()
        reader.task.cancel()
        await asyncio.gather(reader.task, return_exceptions=True)
        assert source.cancelled
        assert world.fleet.num_free("m") == free
    await world.close()


async def test_a_stream_closed_before_it_began_does_nothing() -> None:
    world = World()
    (a,) = await world.replicas("a")
    stream = world.dispatcher.generate(job())
    await stream.aclose()
    assert stream.ready() == [] and stream.over
    assert not a.sources
    await world.close()


async def test_a_job_cancelled_in_the_queue_leaves_no_trace() -> None:
    world = World(max_ahead_per_replica=1)
    (a,) = await world.replicas("a")
    readers = [await begin(world, request_id=f"r{i}") for i in range(7)]
    assert len(a.sources) == 5, "four run, one waits there, two here"
    assert world.admission.num_waiting == 2
    readers[5].task.cancel()
    await asyncio.gather(readers[5].task, return_exceptions=True)
    assert world.admission.num_waiting == 1
    a.sources[0].say(1, finish="stop")
    await settle()
    assert [s.request.request_id for s in a.sources] == ["r0", "r1", "r2", "r3", "r4", "r6"]
    for reader in readers:
        reader.task.cancel()
    await asyncio.gather(*(reader.task for reader in readers), return_exceptions=True)
    await world.close()


async def test_a_place_freed_by_a_push_lets_the_next_one_go_without_polling() -> None:
    world = World(max_ahead_per_replica=1)
    (a,) = await world.replicas("a")
    a.push(num_running=4, num_waiting=1)
    reader = await begin(world)
    assert not a.sources
    a.push(num_running=4, num_waiting=0)
    await settle()
    a.sources[0].say(1, finish="stop")
    await reader.task
    await world.close()


async def test_the_deadline_holds_at_the_replica_too() -> None:
    world = World()
    (a,) = await world.replicas("a")
    reader = await begin(world, deadline=world.now + 0.05)
    assert a.sources[0].request.deadline_s == pytest.approx(0.05)
    with pytest.raises(DeadlineError):
        await reader.task
    assert a.sources[0].cancelled
    await world.close()


async def test_a_prompt_too_long_for_every_replica_is_refused() -> None:
    world = World()
    await world.replicas("a", "b")
    reader = await begin(world, num_tokens=600)
    with pytest.raises(ContextLengthError):
        await reader.task
    await world.close()


async def test_an_abort_nobody_asked_for_is_no_answer() -> None:
    world = World()
    links = await world.replicas("a", "b")
    reader = await begin(world)
    at(*links)[1].say(finish="abort")
    await settle()
    second = at(*links)[1]
    assert second.request.attempt == 2
    second.say(1)
    second.say(finish="abort")
    with pytest.raises(InternalError):
        await reader.task
    await world.close()


async def test_a_link_that_died_unnoticed_costs_no_attempt() -> None:
    world = World(policy="round_robin")
    (a, b) = await world.replicas("a", "b")
    a.alive = False
    reader = await begin(world)
    b.sources[0].say(1, finish="stop")
    await reader.task
    assert reader.stream.num_attempts == 1
    await world.close()
