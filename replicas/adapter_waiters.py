"""Who waits for adapters that are not resident yet: all that want the same one wait for the same load."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from replicas.contract import Fault, GenerateRequest, StepDelta


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request, and since when it waits (monotonic seconds)."""

    request: GenerateRequest
    since: float


@dataclass(slots=True)
class Waiters:
    """Those of one adapter: requests by id, and callers that only want it loaded."""

    requests: dict[str, Waiting] = field(default_factory=dict)
    callers: list[asyncio.Future[None]] = field(default_factory=list)


class WaitingRoom:
    """Everybody who waits, by adapter. `num_tokens`: prompt tokens of all waiting requests."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._by_adapter: dict[str, Waiters] = {}
        self._adapter_of: dict[str, str] = {}
        self._empty = asyncio.Event()

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._adapter_of)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._adapter_of

    @property
    def adapters(self) -> tuple[str, ...]:
        """Adapters that somebody waits for."""
        return tuple(self._by_adapter)

    def sizes(self) -> list[int]:
        """Prompt tokens of each waiting request."""
        return [w.request.num_prompt_tokens for waiters in self._by_adapter.values() for w in waiters.requests.values()]

    def add(self, adapter_id: str, waiting: Waiting) -> None:
        """A request waits."""
        request = waiting.request
        self._of(adapter_id).requests[request.request_id] = waiting
        self._adapter_of[request.request_id] = adapter_id
        self.num_tokens += request.num_prompt_tokens

    def add_caller(self, adapter_id: str) -> asyncio.Future[None]:
        """Somebody who only wants to know when it is there."""
        caller: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._of(adapter_id).callers.append(caller)
        return caller

    def leave(self, request_id: str) -> Waiting:
        """One request gives up."""
        adapter_id = self._adapter_of[request_id]
        waiters = self._by_adapter[adapter_id]
        waiting = waiters.requests.pop(request_id)
        self._gone(waiting)
        if not waiters.requests and not waiters.callers:
            del self._by_adapter[adapter_id]
        return waiting

    def take(self, adapter_id: str) -> Waiters:
        """Everybody who waits for an adapter; they wait no longer."""
        waiters = self._by_adapter.pop(adapter_id, None) or Waiters()
        for waiting in waiters.requests.values():
            self._gone(waiting)
        return waiters

    async def empty(self) -> None:
        """Returns when no request waits."""
        while self._adapter_of:
            self._empty.clear()
            await self._empty.wait()

    def _of(self, adapter_id: str) -> Waiters:
        return self._by_adapter.setdefault(adapter_id, Waiters())

    def _gone(self, waiting: Waiting) -> None:
        del self._adapter_of[waiting.request.request_id]
        self.num_tokens -= waiting.request.num_prompt_tokens
        if not self._adapter_of:
            self._empty.set()


def terminal(waiting: Waiting, fault: Fault) -> StepDelta:
    """How a request ends that will not run."""
    return StepDelta(waiting.request.request_id, waiting.request.attempt, finish_reason="error", fault=fault)
