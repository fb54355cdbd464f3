"""An engine in the same process, as async iterators: for tests, benches and use without a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from replicas.contract import Engine, EngineFacts, GenerateRequest, StepDelta


class LocalEngine:
    """Splits an engine's step sink into one iterator per request.

    async with LocalEngine(engine) as local:
        async for delta in local.stream(request): ...
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.facts: EngineFacts | None = None
        self._streams: dict[str, asyncio.Queue[StepDelta]] = {}

    async def __aenter__(self) -> LocalEngine:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def start(self) -> EngineFacts:
        """Starts the engine. Raises EngineError."""
        self.facts = await self.engine.start(self._deliver)
        return self.facts

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[StepDelta, None]:
        """The deltas of one request, the terminal one last. Raises RefusedError before the first. Closing the
        iterator early aborts the request."""
        queue: asyncio.Queue[StepDelta] = asyncio.Queue()
        self.engine.submit(request)
        self._streams[request.request_id] = queue
        finished = False
        try:
            while not finished:
                delta = await queue.get()
                finished = delta.finish_reason is not None
                yield delta
        finally:
            if not finished:
                self.engine.abort(request.request_id)
            self._streams.pop(request.request_id, None)

    async def generate(self, request: GenerateRequest) -> list[StepDelta]:
        """All deltas of one request. Raises RefusedError."""
        return [delta async for delta in self.stream(request)]

    async def close(self) -> None:
        """Closes the engine; open streams end with its terminal deltas."""
        await self.engine.close()

    def _deliver(self, deltas: Sequence[StepDelta]) -> None:
        for delta in deltas:
            queue = self._streams.get(delta.request_id)
            if queue is not None:
                queue.put_nowait(delta)
