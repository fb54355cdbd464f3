from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.api.flow import MAX_BATCH, Batch, MergedFlow, SingleFlow
from gateway.errors import ReplicaLostError
from replicas.contract import StepDelta


class Source:
    """Deltas that come when the test says so."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[StepDelta | Exception | None] = asyncio.Queue()
        self.closed = 0

    def put(self, *texts: str) -> None:
        for text in texts:
            self.queue.put_nowait(StepDelta("r", text=text))

    async def deltas(self) -> AsyncIterator[StepDelta]:
        try:
            while (item := await self.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            await asyncio.sleep(0)  # cleaning up may take turns of the loop
            self.closed += 1


def texts(batch: Batch) -> list[str]:
    return [delta.text for _, delta in batch]


async def test_deltas_that_wait_come_as_one_batch_and_later_ones_when_they_come() -> None:
    source = Source()
    flow = SingleFlow(source.deltas())
    source.put("a", "b", "c")
    assert texts(await flow.next()) == ["a", "b", "c"]
    later = asyncio.create_task(flow.next())
    await asyncio.sleep(0.01)
    assert not later.done()
    source.put("d")
    assert texts(await later) == ["d"]
    source.put("e")
    await asyncio.sleep(0)
    source.put("f")
    assert texts(await flow.next()) == ["e", "f"]
    source.queue.put_nowait(None)
    assert await flow.next() == []
    assert await flow.next() == []
    await flow.aclose()
    assert source.closed == 1


async def test_batches_are_bounded() -> None:
    source = Source()
    source.put(*map(str, range(MAX_BATCH + 10)))
    flow = SingleFlow(source.deltas())
    assert len(await flow.next()) == MAX_BATCH
    assert len(await flow.next()) == 10
    await flow.aclose()


async def test_an_error_is_told_after_the_deltas_that_came_before_it() -> None:
    source = Source()
    source.put("a", "b")
    source.queue.put_nowait(ReplicaLostError("lost"))
    flow = SingleFlow(source.deltas())
    assert texts(await flow.next()) == ["a", "b"]
    with pytest.raises(ReplicaLostError):
        await flow.next()
    await flow.aclose()
    assert source.closed == 1


async def test_closing_ends_an_iterator_that_is_suspended_in_the_middle_of_a_step() -> None:
    source = Source()
    source.put("a")
    flow = SingleFlow(source.deltas())
    await flow.next()
    await flow.aclose()
    await flow.aclose()
    assert source.closed == 1


async def test_closing_before_the_first_step_starts_nothing() -> None:
    source = Source()
    await SingleFlow(source.deltas()).aclose()
    assert source.closed == 0


async def test_cancelling_the_reader_cancels_the_iterator() -> None:
    source = Source()
    source.put("a")
    flow = SingleFlow(source.deltas())
    await flow.next()
    reader = asyncio.create_task(flow.next())
    await asyncio.sleep(0.01)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await flow.aclose()
    assert source.closed == 1


async def test_iterators_that_are_classes_flow_too() -> None:
    class Three:
        def __init__(self) -> None:
            self.left = 3
            self.closed = False

        def __aiter__(self) -> Three:
            return self

        async def __anext__(self) -> StepDelta:
            if not self.left:
                raise StopAsyncIteration
            self.left -= 1
            if self.left == 1:
                await asyncio.sleep(0.001)
            return StepDelta("r", text=str(self.left))

        async def aclose(self) -> None:
            self.closed = True

    three = Three()
    flow = SingleFlow(three)
    assert [texts(await flow.next()) for _ in range(3)] == [["2"], ["1", "0"], []]
    unfinished = Three()
    flow = SingleFlow(unfinished)
    await flow.next()
    await flow.aclose()
    assert unfinished.closed


async def test_merged_streams_keep_their_indexes_and_their_order() -> None:
    sources = [Source(), Source()]
    flow = MergedFlow([source.deltas() for source in sources])
    sources[1].put("x")
    assert [(i, d.text) for i, d in await flow.next()] == [(1, "x")]
    sources[0].put("a", "b")
    sources[1].queue.put_nowait(None)
    sources[0].queue.put_nowait(None)
    seen: list[str] = []
    while batch := await flow.next():
        assert {index for index, _ in batch} == {0}
        seen += texts(batch)
    assert seen == ["a", "b"]
    await flow.aclose()


async def test_the_first_error_of_merged_streams_ends_all_of_them() -> None:
    sources = [Source(), Source(), Source()]
    flow = MergedFlow([source.deltas() for source in sources])
    sources[1].queue.put_nowait(ReplicaLostError("lost"))
    with pytest.raises(ReplicaLostError):
        await flow.next()
    await flow.aclose()
    assert [source.closed for source in sources] == [1, 1, 1]


async def test_deltas_of_other_jobs_are_told_before_the_error_of_one() -> None:
    good, bad = Source(), Source()
    flow = MergedFlow([good.deltas(), bad.deltas()])
    good.put("a")
    assert texts(await flow.next()) == ["a"]
    good.put("b")
    bad.queue.put_nowait(ReplicaLostError("gone"))
    await asyncio.sleep(0.01)
    assert texts(await flow.next()) == ["b"]
    with pytest.raises(ReplicaLostError):
        await flow.next()
    await flow.aclose()
    assert good.closed == bad.closed == 1
