"""The deltas of one HTTP request's jobs, in batches, on the short way to the client.

    channel reads a frame ─► Deltas ─► Flow ─► consume ─► written        no task wakes up for a token

Whatever is there is taken at once, so that an ingress that falls behind writes fewer, larger pieces (each delta still
its own event) instead of falling further behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

from gateway.types import Deltas, Dispatcher, Job
from replicas.contract import StepDelta

Batch: TypeAlias = list[tuple[int, StepDelta]]
"""(index of the job, its delta), each job's deltas in order."""

Writing: TypeAlias = Coroutine[Any, Any, None]
Consume: TypeAlias = Callable[[Batch], Writing | None]
"""Takes a batch; returns what must be run before the next one, if anything."""


class Flow(Protocol):
    """Errors of jobs are told after the deltas that came before them; the first one stands for all."""

    async def begin(self) -> Batch:
        """Starts the jobs; at least one delta. To be called once. Raises what a job raises."""
        ...

    def ready(self) -> Batch:
        """What has come since, without waiting; [] when there is nothing. Raises what a job raises."""
        ...

    @property
    def over(self) -> bool:
        """Nothing more will come than the next `ready` gives or raises."""
        ...

    def listen(self, callback: Callable[[], None] | None) -> None:
        """Calls back whenever `ready` may have something."""
        ...

    def replica_ids(self) -> list[str]:
        """The replicas that have answered so far, each once."""
        ...

    async def aclose(self) -> None:
        """Cancels every job that has not ended. Idempotent."""
        ...


def open_flow(dispatcher: Dispatcher, jobs: Sequence[Job]) -> Flow:
    """Starts nothing before `begin`."""
    streams = [dispatcher.generate(job) for job in jobs]
    return SingleFlow(streams[0]) if len(streams) == 1 else MergedFlow(streams)


async def relay(flow: Flow, consume: Consume) -> None:
    """Gives all that comes after `begin` to `consume`, from the callback that brings it; returns at the end.

    The task that calls this wakes up when a write has to wait (a client that reads slowly), at the end, and for errors.
    Raises what jobs and `consume` raise.
    """
    while True:
        while batch := flow.ready():
            writing = consume(batch)
            if writing is not None:
                await writing
        if flow.over:
            return
        waiting = await _Tap(flow, consume).run()
        if waiting is not None:
            await waiting


class _Suspended:
    """A coroutine that was begun outside a task and has to wait: awaiting it carries it on from where it stands.

    `__await__` hands the future it waits for to the event loop, then passes results and exceptions back in: what
    `await` itself does, begun in the middle.
    """

    __slots__ = ("_step", "_waits_for")

    def __init__(self, step: Writing, waits_for: Any) -> None:
        self._step = step
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, None]:
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
            except StopIteration:
                return
            finally:
                del thrown  # its traceback holds this frame

    def close(self) -> None:
        """Ends it where it stands."""
        self._step.close()


class _Tap:
    """Consumes a flow from its callback until it ends, fails, or a write has to wait."""

    __slots__ = ("_consume", "_done", "_error", "_flow", "_waiting")

    def __init__(self, flow: Flow, consume: Consume) -> None:
        self._flow = flow
        self._consume = consume
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting: _Suspended | None = None
        self._error: BaseException | None = None

    async def run(self) -> _Suspended | None:
        """The write to be awaited, None at the end."""
        self._flow.listen(self._came)
        try:
            await self._done
        except asyncio.CancelledError:
            if self._waiting is not None:
                self._waiting.close()
            raise
        finally:
            self._flow.listen(None)
        try:
            if self._error is not None:
                raise self._error
        finally:
            self._error = None  # it holds this frame
        return self._waiting

    def _came(self) -> None:
        if self._done.done():  # the task is about to wake up
            return
        try:
            through = self._consume_what_came()
        except (Exception, asyncio.CancelledError) as error:  # the channel that called must go on
            self._error = error
            through = True
        if through:
            self._done.set_result(None)

    def _consume_what_came(self) -> bool:
        """Whether the task must go on: a write waits, or nothing more will come."""
        batch = self._flow.ready()
        writing = self._consume(batch) if batch else None
        if writing is not None:
            try:
                self._waiting = _Suspended(writing, writing.send(None))
                return True
            except StopIteration:  # written: the common case
                pass
        return self._flow.over


class SingleFlow:
    """One job: nothing between its deltas and who consumes them."""

    def __init__(self, deltas: Deltas) -> None:
        self._deltas = deltas
        self.listen = deltas.listen

    async def begin(self) -> Batch:
        return [(0, await self._deltas.first())]

    def ready(self) -> Batch:
        return [(0, delta) for delta in self._deltas.ready()]

    @property
    def over(self) -> bool:
        return self._deltas.over

    def replica_ids(self) -> list[str]:
        return _replica_ids([self._deltas])

    async def aclose(self) -> None:
        await self._deltas.aclose()


class MergedFlow:
    """Several jobs, a task each until its first delta. The first error ends all of them."""

    def __init__(self, streams: Sequence[Deltas]) -> None:
        self._streams = streams
        self._firsts: Batch = []
        self._news: dict[int, None] = {}  # jobs that may have something, in the order they said so
        self._error: Exception | None = None
        self._told_last = False
        self._num_open = len(streams)
        self._callback: Callable[[], None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self) -> Batch:
        begun = asyncio.Event()
        self.listen(begun.set)
        self._tasks = [asyncio.create_task(self._begin(i, s)) for i, s in enumerate(self._streams)]
        await begun.wait()
        self.listen(None)
        return self.ready()

    def ready(self) -> Batch:
        if self._error is not None and self._told_last:
            raise self._error
        batch, self._firsts = self._firsts, []
        news, self._news = self._news, {}
        for index in news:
            stream = self._streams[index]
            try:
                while deltas := stream.ready():
                    batch += [(index, delta) for delta in deltas]
            except Exception as error:
                self._failed(error)
            else:
                self._num_open -= stream.over
        if self._error is not None:
            if not batch:
                raise self._error
            self._told_last = True  # what the other jobs still say would be for nobody
        return batch

    @property
    def over(self) -> bool:
        return self._error is not None or not self._num_open

    def listen(self, callback: Callable[[], None] | None) -> None:
        self._callback = callback

    def replica_ids(self) -> list[str]:
        return _replica_ids(self._streams)

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:  # a second cancellation must not keep the replicas at work
            for stream in self._streams:
                await stream.aclose()

    async def _begin(self, index: int, stream: Deltas) -> None:
        try:
            first = await stream.first()
        except Exception as error:
            self._failed(error)
        else:
            self._firsts.append((index, first))
            stream.listen(partial(self._came, index))
            self._news[index] = None
        self._tell()

    def _came(self, index: int) -> None:
        self._news[index] = None
        self._tell()

    def _tell(self) -> None:
        if self._callback is not None:
            self._callback()

    def _failed(self, error: Exception) -> None:
        self._error = self._error or error
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()


def _replica_ids(streams: Sequence[Deltas]) -> list[str]:
    return sorted({replica_id for stream in streams if (replica_id := stream.replica_id) is not None})
