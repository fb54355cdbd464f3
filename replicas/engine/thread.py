"""The thread an engine steps in: takes messages between steps, hands deltas over once per step, never polls."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import msgspec

from replicas.contract import (
    EngineError,
    EngineFacts,
    EngineStats,
    Fault,
    GenerateRequest,
    KvEvent,
    RefusedError,
    StepDelta,
)
from replicas.engine.core import EngineCore
from replicas.engine.limits import unknown_token
from replicas.engine.stall import thread_cpu_s
from replicas.engine.structured.grammar import Grammar
from replicas.engine.structured.store import GrammarStore
from routing.waiting import merged

T = TypeVar("T")
logger = logging.getLogger(__name__)

MAX_WAITING_EVENTS = 65536


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """What a factory returns from the engine's thread: ready to step, self-check passed."""

    core: EngineCore
    facts: EngineFacts
    grammars: GrammarStore | None = None


@dataclass(frozen=True, slots=True)
class Constrained:
    """A request with the grammar it asks for."""

    request: GenerateRequest
    grammar: Grammar


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class Call:
    """Work for the engine's thread between two steps; `done` is completed on the event loop."""

    work: Callable[[EngineCore], None]
    done: asyncio.Future[None]


Message: TypeAlias = GenerateRequest | Constrained | Abort | Call


class Outlet(Protocol):
    """Who hears from the thread. Called on the event loop."""

    def deliver(self, deltas: list[StepDelta]) -> None: ...

    def bury(self, fault: Fault) -> None:
        """The thread has ended."""
        ...


class EngineThread:
    """Runs one EngineCore. What it writes for the event loop to read are single references: no locks.

    `events`: a deque to pop from. `progress_at`: when the last step ended, on `clock`.
    """

    def __init__(self, build: Callable[[], BuiltEngine], clock: Callable[[], float]) -> None:
        self.events: deque[KvEvent] = deque()
        self.progress_at = clock()
        self.predicted_step_s = 0.0
        self.is_calling = False
        self._build = build
        self._clock = clock
        self._inbox: deque[Message] = deque()
        self._stats = EngineStats()
        self._num_sent = 0
        self._num_taken = 0
        self._num_counted = 0
        self._uncounted: deque[tuple[int, int]] = deque()  # (number of the message, prompt tokens)
        self._wake = threading.Event()
        self._is_stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # On the event loop.

    async def start(self, outlet: Outlet) -> BuiltEngine:
        """Builds the engine in the thread and starts stepping. Raises whatever the factory raised."""
        assert self._thread is None, "an engine is started once"
        self._loop = asyncio.get_running_loop()
        built: asyncio.Future[BuiltEngine] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, args=(built, outlet), name="engine", daemon=True)
        self._thread.start()
        return await asyncio.shield(built)

    def send(self, message: Message) -> None:
        """Leaves a message to be taken before the next step."""
        self._num_sent += 1
        request = message.request if isinstance(message, Constrained) else message
        if isinstance(request, GenerateRequest):
            self._forget_counted(self._num_counted)
            self._uncounted.append((self._num_sent, _num_to_compute(request)))
        self._inbox.append(message)
        self._wake.set()

    def load(self, unsent: Iterable[GenerateRequest] = ()) -> EngineStats:
        """The engine's load: as of its last step, and as waiting the requests sent since and those yet to be sent."""
        counted, stats = self._num_counted, self._stats  # in this order: the thread writes them in the other one
        self._forget_counted(counted)
        sizes = [num_tokens for _, num_tokens in self._uncounted]
        sizes += map(_num_to_compute, unsent)
        if not sizes:
            return stats
        return msgspec.structs.replace(
            stats,
            num_waiting=stats.num_waiting + len(sizes),
            num_unseen=len(sizes),
            num_waiting_tokens=stats.num_waiting_tokens + sum(sizes),
            waiting_sizes=merged(stats.waiting_sizes, sizes),
        )

    def _forget_counted(self, counted: int) -> None:
        """Messages up to this number are in the thread's own stats."""
        while self._uncounted and self._uncounted[0][0] <= counted:
            self._uncounted.popleft()

    def stop(self) -> None:
        """Asks the thread to end after the step under way."""
        self._is_stopping = True
        self._wake.set()

    async def join(self, timeout_s: float) -> None:
        """Waits until the thread has ended, or `timeout_s` have passed."""
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, timeout_s)

    def cpu_s(self) -> float:
        """CPU seconds the thread has used."""
        return thread_cpu_s(self._thread)

    def fail_calls(self, error: EngineError) -> None:
        """Ends the calls that will not be taken any more."""
        for message in list(self._inbox):
            if isinstance(message, Call):
                _complete(message.done, error)

    # In the thread.

    def _main(self, built: asyncio.Future[BuiltEngine], outlet: Outlet) -> None:
        try:
            engine = self._build()
        except BaseException as error:
            failure = error if isinstance(error, Exception) else EngineError(f"{type(error).__name__}: {error}")
            self._post(lambda: _complete(built, failure))
            return
        self._stats = engine.core.stats()
        self._post(lambda: _complete(built, engine))
        fault = Fault("engine_dead", "the engine was closed", retryable=True)
        try:
            fault = self._run(engine, outlet) or fault
        except BaseException as error:
            logger.exception("engine thread failed")
            fault = Fault("engine_dead", f"the engine stopped: {type(error).__name__}: {error}", retryable=True)
        finally:
            self._post(lambda: outlet.bury(fault))

    def _run(self, engine: BuiltEngine, outlet: Outlet) -> Fault | None:
        """Steps until stopped or dead; sleeps when there is nothing to do."""
        core = engine.core
        while not self._is_stopping:
            if not core.has_work and not self._inbox:
                self._wake.wait()
            self._wake.clear()
            while self._inbox:
                self._take(engine, self._inbox.popleft(), outlet)
                self._num_taken += 1
            if not core.has_work:
                self._publish(core)  # what was taken was refused, or aborted
                continue
            deltas = core.step()
            self._publish(core)
            if deltas:
                self._post(lambda deltas=deltas: outlet.deliver(deltas))  # type: ignore[misc]
            if core.dead is not None:
                return core.dead
        return None

    def _take(self, engine: BuiltEngine, message: Message, outlet: Outlet) -> None:
        core = engine.core
        if isinstance(message, GenerateRequest):
            self._add(engine, message, None, outlet)
        elif isinstance(message, Constrained):
            self._add(engine, message.request, message.grammar, outlet)
        elif isinstance(message, Abort):
            core.abort(message.request_id)
        else:
            self._call(core, message)

    def _add(self, engine: BuiltEngine, request: GenerateRequest, grammar: Grammar | None, outlet: Outlet) -> None:
        fault = unknown_token(request, engine.facts.vocab_size)
        try:
            if fault is not None:
                raise RefusedError(fault)
            engine.core.add(request, grammar)
        except RefusedError as error:
            delta = StepDelta(request.request_id, request.attempt, finish_reason="error", fault=error.fault)
            self._post(lambda: outlet.deliver([delta]))

    def _call(self, core: EngineCore, call: Call) -> None:
        failure: Exception | None = None
        self.is_calling = True
        try:
            call.work(core)
        except Exception as error:
            failure = error
        finally:
            self._publish(core)
            self.is_calling = False
        self._post(lambda: _complete(call.done, failure))

    def _publish(self, core: EngineCore) -> None:
        self.progress_at = self._clock()
        self.predicted_step_s = core.predicted_step_s()
        self._stats = core.stats()
        self._num_counted = self._num_taken
        if len(self.events) < MAX_WAITING_EVENTS:  # else the pool keeps them, and shortens them when it must
            self.events.extend(core.kv_events())

    def _post(self, callback: Callable[[], object]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the event loop is closed: nobody is left to tell
            self._is_stopping = True


def _num_to_compute(request: GenerateRequest) -> int:
    """Tokens of its prompt, but for those that the cache holds as far as is known."""
    return request.num_uncached or max(1, request.num_prompt_tokens)


def _complete(future: asyncio.Future[T], outcome: T | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
