from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable

import pytest

from gateway.api.flow import Batch, Flow, MergedFlow, SingleFlow, Writing, relay
from gateway.errors import ReplicaLostError
from replicas.contract import StepDelta


class Source:
    """A job's deltas, which come when the test says so (`gateway.types.Deltas`)."""

    replica_id = "a"

    def __init__(self, *texts: str) -> None:
        self.over = False
        self.closed = False
        self._come = [StepDelta("r", text=text) for text in texts]
        self._error: Exception | None = None
        self._callback: Callable[[], None] | None = None
        self._first = asyncio.Event()
        if texts:
            self._first.set()

    @property
    def heard(self) -> bool:
        return self._callback is not None

    async def first(self) -> StepDelta:
        await self._first.wait()
        if not self._come:
            assert self._error is not None
            raise self._error
        return self._come.pop(0)

    def ready(self) -> list[StepDelta]:
        come, self._come = self._come, []
        if self._error is not None and not come:
            raise self._error
        return come

    def listen(self, callback: Callable[[], None] | None) -> None:
        self._callback = callback

    async def aclose(self) -> None:
        self.closed = True

    def say(self, *texts: str) -> None:
        self._come += [StepDelta("r", text=text) for text in texts]
        self._tell()

    def end(self, error: Exception | None = None) -> None:
        self.over = True
        self._error = error
        self._tell()

    def _tell(self) -> None:
        self._first.set()
        if self._callback is not None:
            self._callback()


class Reading:
    """A task that begins a flow and relays the rest. `writing` makes what a batch must wait for."""

    def __init__(self, flow: Flow, writing: Callable[[], Writing | None] = lambda: None) -> None:
        self.batches: list[list[tuple[int, str]]] = []
        self._writing = writing
        self.task = asyncio.create_task(self._read(flow))

    async def _read(self, flow: Flow) -> None:
        try:
            self._take(await flow.begin())
            await relay(flow, self._take)
        finally:
            await flow.aclose()

    def _take(self, batch: Batch) -> Writing | None:
        self.batches.append([(index, delta.text) for index, delta in batch])
        return self._writing()

    @property
    def texts(self) -> list[str]:
        return ["".join(text for _, text in batch) for batch in self.batches]


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_deltas_are_consumed_in_the_very_call_that_tells_of_them() -> None:
    source = Source("a")
    reading = Reading(SingleFlow(source))
    await turns()
    assert reading.texts == ["a"] and source.heard
    source.say("b")
    assert reading.texts == ["a", "b"], "no turn of the event loop in between"
    source.say("c", "d")
    assert reading.texts == ["a", "b", "cd"]
    source.end()
    await reading.task
    assert source.closed and not source.heard


async def test_what_came_before_the_flow_is_listened_to_is_not_lost() -> None:
    source = Source("a", "b", "c")
    source.end()
    reading = Reading(SingleFlow(source))
    await reading.task
    assert reading.texts == ["a", "bc"]


async def test_an_error_is_told_after_the_deltas_that_came_before_it() -> None:
    source = Source("a")
    reading = Reading(SingleFlow(source))
    await turns()
    source._come = [StepDelta("r", text="b")]
    source.end(ReplicaLostError("lost"))
    with pytest.raises(ReplicaLostError):
        await reading.task
    assert reading.texts == ["a", "b"]


async def test_an_error_of_the_consumer_ends_the_reading_and_closes_the_job() -> None:
    source = Source("a")
    reading = Reading(SingleFlow(source))
    await turns()

    def broken() -> None:
        raise ValueError("cannot write")

    reading._writing = broken
    source.say("b")
    with pytest.raises(ValueError, match="cannot write"):
        await reading.task
    assert source.closed


async def test_a_write_that_waits_holds_back_what_comes_until_it_is_through() -> None:
    source, gate, written = Source("a"), asyncio.Event(), list[str]()

    async def slowly() -> None:
        await gate.wait()
        written.append("written")

    reading = Reading(SingleFlow(source))
    await turns()
    reading._writing = slowly
    source.say("b")
    assert reading.texts == ["a", "b"] and not written
    source.say("c")
    await turns()
    source.say("d")
    assert reading.texts == ["a", "b"], "the client does not read: nothing more is taken from the channel"
    gate.set()
    await turns()
    assert (reading.texts, len(written)) == (["a", "b", "cd"], 2)
    source.say("e")
    assert reading.texts[-1] == "e", "and then the short way again"
    source.end()
    await reading.task


async def test_a_write_that_fails_while_it_waits_is_the_readers_error() -> None:
    source, gate = Source("a"), asyncio.Event()

    async def fail() -> None:
        await gate.wait()
        raise ConnectionError("gone")

    reading = Reading(SingleFlow(source))
    await turns()
    reading._writing = fail
    source.say("b")
    gate.set()
    with pytest.raises(ConnectionError):
        await reading.task
    assert source.closed


@pytest.mark.parametrize("waits", [False, True])
async def test_cancelling_the_reader_closes_the_job_and_leaves_nothing(waits: bool) -> None:
    async def forever() -> None:
        await asyncio.get_running_loop().create_future()

    source = Source("a")
    reading = Reading(SingleFlow(source))
    await turns()
    if waits:
        reading._writing = forever
        source.say("b")
        await turns()
    reading.task.cancel()
    source.say("c")
    with pytest.raises(asyncio.CancelledError):
        await reading.task
    source.say("d")
    assert source.closed and "d" not in reading.texts
    gc.collect()  # an exception nobody fetched would be logged now


async def test_a_finished_relay_leaves_no_cycle_to_the_collector() -> None:
    source = Source("a")
    flow = SingleFlow(source)
    reading = Reading(flow)
    await turns()
    source.say("b")
    source.end()
    await reading.task
    gone = weakref.ref(flow)
    gc.disable()
    try:
        del flow, reading
        await turns()
        assert gone() is None
    finally:
        gc.enable()


async def test_a_cancellation_from_inside_a_write_stays_with_its_own_reader() -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    source = Source("a")
    reading = Reading(SingleFlow(source))
    await turns()
    reading._writing = cancelled
    source.say("b")  # returns: the channel goes on
    with pytest.raises(asyncio.CancelledError):
        await reading.task
    assert source.closed


async def test_merged_jobs_are_closed_even_when_their_reader_is_cancelled_twice() -> None:
    class Stubborn(Source):
        async def first(self) -> StepDelta:
            try:
                return await super().first()
            finally:
                await asyncio.sleep(0)  # cleaning up takes a turn of the loop

    sources = [Stubborn("a"), Stubborn(), Stubborn()]
    reading = Reading(MergedFlow(sources))
    await turns()
    reading.task.cancel()
    await asyncio.sleep(0)
    reading.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading.task
    assert [source.closed for source in sources] == [True] * 3


async def test_an_error_of_one_merged_job_is_told_though_another_never_pauses() -> None:
    chatty, bad = Source("a"), Source("x")

    async def wait_while_more_comes() -> None:
        await asyncio.sleep(0)
        chatty.say("c")

    reading = Reading(MergedFlow([chatty, bad]))
    await turns()
    reading._writing = wait_while_more_comes
    chatty.say("b")
    bad.end(ReplicaLostError("gone"))
    with pytest.raises(ReplicaLostError):
        await asyncio.wait_for(reading.task, 10)


async def test_merged_jobs_keep_their_indexes_and_their_order() -> None:
    sources = [Source(), Source()]
    reading = Reading(MergedFlow(sources))
    await turns()
    sources[1].say("x")
    await turns()
    sources[0].say("a")
    await turns()
    sources[0].say("b", "c")
    assert reading.batches == [[(1, "x")], [(0, "a")], [(0, "b"), (0, "c")]]
    sources[1].end()
    await turns()
    assert not reading.task.done()
    sources[0].end()
    await reading.task
    assert all(source.closed for source in sources)


async def test_jobs_that_begin_together_are_one_batch() -> None:
    flow = MergedFlow([Source("a"), Source("b"), Source("c")])
    batch = await flow.begin()
    assert sorted((index, delta.text) for index, delta in batch) == [(0, "a"), (1, "b"), (2, "c")]
    await flow.aclose()


async def test_the_first_error_of_merged_jobs_ends_all_of_them() -> None:
    sources = [Source(), Source(), Source()]
    reading = Reading(MergedFlow(sources))
    await turns()
    sources[1].end(ReplicaLostError("lost"))
    with pytest.raises(ReplicaLostError):
        await reading.task
    assert all(source.closed for source in sources)


async def test_deltas_of_other_jobs_are_told_before_the_error_of_one() -> None:
    good, bad = Source("a"), Source()
    reading = Reading(MergedFlow([good, bad]))
    await turns()
    good._come = [StepDelta("r", text="b")]
    bad.end(ReplicaLostError("gone"))
    good.say("c")
    with pytest.raises(ReplicaLostError):
        await reading.task
    assert reading.texts == ["a", "bc"]


async def test_an_error_behind_a_merged_jobs_last_deltas_is_not_swallowed() -> None:
    sources = [Source("a"), Source("x")]
    reading = Reading(MergedFlow(sources))
    await turns()
    sources[0]._come = [StepDelta("r", text="b")]
    sources[0].end(ReplicaLostError("gone"))
    with pytest.raises(ReplicaLostError):
        await reading.task
    assert ("".join(reading.texts)).endswith("b")
