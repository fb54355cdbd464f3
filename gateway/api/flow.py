"""The deltas of one HTTP request's jobs, in batches.

Whatever is waiting is taken at once, so that an ingress that falls behind writes fewer, larger pieces (each delta still
its own event) instead of falling further behind.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Generator, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeAlias

from gateway.types import Deltas, Dispatcher, Job
from replicas.contract import StepDelta

MAX_BATCH = 64

Batch: TypeAlias = list[tuple[int, StepDelta]]
"""(index of the job, its delta), each job's deltas in order."""


class Flow(Protocol):
    async def next(self) -> Batch:
        """At least one delta, or [] when every job has ended. Raises what a job's iterator raises."""
        ...

    def replica_ids(self) -> list[str]:
        """The replicas that have answered so far, each once."""
        ...

    async def aclose(self) -> None:
        """Cancels every job that has not ended. Idempotent."""
        ...


def open_flow(dispatcher: Dispatcher, jobs: Sequence[Job]) -> Flow:
    """Starts nothing before the first `next`."""
    if len(jobs) == 1:
        return SingleFlow(dispatcher.generate(jobs[0]))
    return MergedFlow([dispatcher.generate(job) for job in jobs])


class _Suspended:
    """A step of an iterator that has to wait: awaiting it carries the step on from where it stands.

    `__await__` hands the future it waits for to the event loop, then passes results and exceptions back in: what
    `await` itself does, begun in the middle.
    """

    __slots__ = ("_step", "_waits_for")

    def __init__(self, step: Generator[Any, Any, StepDelta], waits_for: Any) -> None:
        self._step = step
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, StepDelta]:
        waits_for = self._waits_for
        while True:
            thrown: BaseException | None = None
            value = None
            try:
                value = yield waits_for
            except BaseException as error:
                thrown = error
            try:
                waits_for = self._step.send(value) if thrown is None else self._step.throw(thrown)
            except StopIteration as done:
                result: StepDelta = done.value
                return result

    async def cancel(self) -> None:
        """Ends the step as a cancelled task would, and waits until its `finally` blocks are through."""
        with suppress(asyncio.CancelledError, StopAsyncIteration):
            try:
                self._waits_for = self._step.throw(asyncio.CancelledError())
            except StopIteration:
                return
            await self


class SingleFlow:
    """One job's iterator, no task of its own. After the delta it waited for, it takes those that are there already:
    it runs the iterator's next step until that would wait, and keeps the suspended step for the next call."""

    def __init__(self, deltas: Deltas) -> None:
        self._deltas = deltas
        self._suspended: _Suspended | None = None
        self._end: Exception | None = None

    async def next(self) -> Batch:
        batch: Batch = []
        if self._end is None:
            try:
                await self._fill(batch)
            except Exception as end:  # told after the deltas that came before it
                self._end = end
        if self._end is not None and not batch and not isinstance(self._end, StopAsyncIteration):
            raise self._end
        return batch

    def replica_ids(self) -> list[str]:
        return _replica_ids([self._deltas])

    async def _fill(self, batch: Batch) -> None:
        suspended, self._suspended = self._suspended, None
        batch.append((0, await (suspended or self._deltas.__anext__())))
        while len(batch) < MAX_BATCH:
            step = _steps(self._deltas.__anext__())
            try:
                waits_for = step.send(None)
            except StopIteration as done:
                batch.append((0, done.value))
            else:
                self._suspended = _Suspended(step, waits_for)
                return

    async def aclose(self) -> None:
        suspended, self._suspended = self._suspended, None
        if suspended is not None:
            await suspended.cancel()
        if self._end is None:
            await self._deltas.aclose()


class MergedFlow:
    """Several jobs' iterators, a task each. The first error ends all of them."""

    def __init__(self, streams: Sequence[Deltas]) -> None:
        self._streams = streams
        self._waiting: deque[tuple[int, StepDelta]] = deque()
        self._news = asyncio.Event()
        self._error: BaseException | None = None
        self._num_open = len(streams)
        self._tasks: list[asyncio.Task[None]] = []

    async def next(self) -> Batch:
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._pump(i, s)) for i, s in enumerate(self._streams)]
        while self._error is None and not self._waiting and self._num_open:
            self._news.clear()
            await self._news.wait()
        if self._error is not None:
            for task in self._tasks:
                task.cancel()
            if not self._waiting:  # told after the deltas that came before it
                raise self._error
        batch: Batch = []
        while self._waiting and len(batch) < MAX_BATCH:
            batch.append(self._waiting.popleft())
        return batch

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def replica_ids(self) -> list[str]:
        return _replica_ids(self._streams)

    async def _pump(self, index: int, deltas: Deltas) -> None:
        try:
            async for delta in deltas:
                self._waiting.append((index, delta))
                self._news.set()
        except Exception as error:
            self._error = self._error or error
        finally:
            await deltas.aclose()
            self._num_open -= 1
            self._news.set()


def _steps(awaitable: Awaitable[StepDelta]) -> Generator[Any, Any, StepDelta]:
    return awaitable.__await__()


def _replica_ids(streams: Sequence[Deltas]) -> list[str]:
    return sorted({replica_id for stream in streams if (replica_id := stream.replica_id) is not None})
