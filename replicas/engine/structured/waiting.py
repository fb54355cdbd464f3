"""Requests on their way to the engine's thread whose grammars are being compiled. On the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from replicas.contract import Fault, GenerateRequest, RefusedError, StepDelta, unpack_tokens
from replicas.engine.structured.grammar import Grammar
from replicas.engine.structured.store import GrammarStore

logger = logging.getLogger(__name__)


class GrammarWaiters:
    """Gives each request to `ready` with its grammar, or to `refused` with why not. Nobody else waits for it."""

    def __init__(
        self,
        store: GrammarStore,
        ready: Callable[[GenerateRequest, Grammar], None],
        refused: Callable[[StepDelta], None],
    ) -> None:
        self._store = store
        self._ready = ready
        self._refused = refused
        self._waiting: dict[str, tuple[GenerateRequest, asyncio.Task[None]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def requests(self) -> list[GenerateRequest]:
        """Those that wait."""
        return [request for request, _ in self._waiting.values()]

    def submit(self, request: GenerateRequest) -> None:
        """Begins to get a request's grammar."""
        self._waiting[request.request_id] = request, asyncio.create_task(self._wait(request))

    def abort(self, request_id: str) -> bool:
        """Whether the request waited here; it does not any more, and nobody is told."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is None:
            return False
        waiting[1].cancel()
        return True

    def close(self) -> None:
        """Forgets who waits, and closes the store. Idempotent."""
        for request_id in list(self._waiting):
            self.abort(request_id)
        self._store.close()

    async def _wait(self, request: GenerateRequest) -> None:
        constraint = request.sampling.constraint
        assert constraint is not None, "only such requests come here"
        try:
            grammar = await self._store.get(constraint, unpack_tokens(request.produced))
        except Exception as error:
            self._waiting.pop(request.request_id, None)
            fault = error.fault if isinstance(error, RefusedError) else _unexpected(error)
            self._refused(StepDelta(request.request_id, request.attempt, finish_reason="error", fault=fault))
        else:
            self._waiting.pop(request.request_id, None)
            self._ready(request, grammar)


def _unexpected(error: Exception) -> Fault:
    logger.error("a grammar could not be compiled", exc_info=error)
    return Fault("internal", f"the grammar could not be compiled: {type(error).__name__}", retryable=True)
