"""Reading `gateway.types.Deltas` one by one, and making them of an async iterator: what tests want, nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from gateway.types import Deltas
from replicas.contract import StepDelta


async def each(stream: Deltas) -> AsyncIterator[StepDelta]:
    """Every delta; raises what the stream raises."""
    yield await stream.first()
    while True:
        came = asyncio.Event()
        stream.listen(came.set)
        while deltas := stream.ready():
            for delta in deltas:
                yield delta
        if stream.over:
            return
        await came.wait()


class PumpedDeltas:
    """The deltas of an async iterator, read by a task as far as they come. Implements `gateway.types.Deltas`."""

    def __init__(self, deltas: AsyncGenerator[StepDelta, None], replica_id: str = "scripted-0") -> None:
        self.replica_id = replica_id
        self._deltas = deltas
        self._come: list[StepDelta] = []
        self._error: Exception | None = None
        self._over = False
        self._callback: Callable[[], None] | None = None
        self._pump: asyncio.Task[None] | None = None

    async def first(self) -> StepDelta:
        delta = await anext(self._deltas)
        self._pump = asyncio.create_task(self._read())
        return delta

    def ready(self) -> list[StepDelta]:
        deltas, self._come = self._come, []
        if self._error is not None and not deltas:
            raise self._error
        return deltas

    @property
    def over(self) -> bool:
        return self._over

    def listen(self, callback: Callable[[], None] | None) -> None:
        self._callback = callback

    async def aclose(self) -> None:
        if self._pump is not None and not self._pump.done():
            self._pump.cancel()
            await asyncio.wait([self._pump])
        await self._deltas.aclose()

    async def _read(self) -> None:
        try:
            async for delta in self._deltas:
                self._come.append(delta)
                self._tell()
        except Exception as error:
            self._error = error
        self._over = True
        self._tell()

    def _tell(self) -> None:
        if self._callback is not None:
            self._callback()
