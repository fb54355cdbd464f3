"""An engine in a thread of its own, so that neither loading nor stepping holds up the event loop.

event loop                               engine thread
submit, abort ── inbox (deque) ────────► take inbox, EngineCore.step()
sink(deltas)  ◄─ call_soon_threadsafe ── once per step that has deltas
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from replicas.contract import (
    AdapterSpec,
    EngineDeadError,
    EngineError,
    EngineFacts,
    EngineStats,
    Fault,
    GenerateRequest,
    KvEvent,
    RefusedError,
    StepDelta,
    StepSink,
)
from replicas.engine.core import EngineCore
from replicas.engine.limits import refusal
from replicas.engine.stall import StallDetector
from replicas.engine.structured.grammar import Grammar
from replicas.engine.structured.waiting import GrammarWaiters
from replicas.engine.thread import Abort, BuiltEngine, Call, Constrained, EngineThread

__all__ = ["BuiltEngine", "ThreadedEngine"]

logger = logging.getLogger(__name__)

WATCH_PERIOD_S = 1.0
CLOSE_TIMEOUT_S = 10.0


class ThreadedEngine:
    """`replicas.contract.Engine` around an EngineCore that `build` makes in the engine's own thread.

    `build` may take as long as loading weights takes; an exception of it is raised by `start` as EngineError. The
    engine is dead when a step fails, when the thread ends, or when there is work and no progress for too long
    (`StallDetector`): open requests then end with `engine_dead`, `submit` refuses, and `stats` raises EngineDeadError.
    """

    def __init__(self, build: Callable[[], BuiltEngine], clock: Callable[[], float] = time.monotonic) -> None:
        self._thread = EngineThread(build, clock)
        self._stall = StallDetector(self._thread.cpu_s)
        self._clock = clock
        self._sink: StepSink | None = None
        self._facts: EngineFacts | None = None
        self._core: EngineCore | None = None
        self._max_open = 0
        self._open: dict[str, int] = {}  # request id → attempt
        self._busy_since = 0.0
        self._adapters: set[str] = set()
        self._dead: Fault | None = None
        self._draining = False
        self._closing = False
        self._drained = asyncio.Event()
        self._watch: asyncio.TimerHandle | None = None
        self._waiters: GrammarWaiters | None = None

    @property
    def dead(self) -> Fault | None:
        """Why the engine is of no more use; None while it lives."""
        return self._dead

    @property
    def stalled(self) -> bool:
        """Whether there is work and has been no progress for too long. Loading an adapter is not a stall."""
        if not self._num_sent or self._thread.is_calling:
            return False
        return self._stall.stalled(self._clock(), self._progress_at(), self._thread.predicted_step_s)

    # Engine protocol.

    async def start(self, sink: StepSink) -> EngineFacts:
        """Builds the engine in its thread and starts stepping. Raises EngineError when it could not be built."""
        self._sink = sink
        try:
            built = await self._thread.start(self)
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"the engine did not start: {type(error).__name__}: {error}") from error
        self._facts = built.facts
        self._core = built.core
        if built.grammars is not None:
            self._waiters = GrammarWaiters(built.grammars, self._constrained, lambda delta: self.deliver([delta]))
        limits = built.core.scheduler.config
        self._max_open = limits.max_num_seqs + limits.max_waiting
        self._watch_progress()
        return built.facts

    def submit(self, request: GenerateRequest) -> None:
        """Accepts a request: exactly one terminal delta follows. Raises RefusedError, then none does."""
        fault = self._refusal(request)
        if fault is not None:
            raise RefusedError(fault)
        self._open[request.request_id] = request.attempt
        if request.sampling.constraint is None:
            self._begin(request)
        else:
            assert self._waiters is not None, "engines without grammars refuse it"
            self._waiters.submit(request)

    def abort(self, request_id: str) -> None:
        """Ends a request with finish_reason `abort` after the step under way. No-op when finished."""
        attempt = self._open.get(request_id)
        if attempt is None:
            return
        if self._waiters is not None and self._waiters.abort(request_id):
            ended = StepDelta(request_id, attempt, finish_reason="abort")
            asyncio.get_running_loop().call_soon(self.deliver, [ended])
        else:
            self._thread.send(Abort(request_id))

    async def load_adapter(self, adapter: AdapterSpec) -> None:
        """Makes an adapter usable: reads it beside the steps, and puts it into its slot between two of them.

        Raises EngineError when the engine has no adapters, no free slot, or cannot load it.
        """
        if self._core is None:
            raise EngineDeadError("the engine is not running")
        install = await asyncio.to_thread(self._core.read_adapter, adapter)
        await self._call(lambda core: install())
        self._adapters.add(adapter.adapter_id)

    async def unload_adapter(self, adapter_id: str) -> None:
        """Forgets an adapter: new requests for it are refused. Raises EngineError while requests use it."""
        known = adapter_id in self._adapters
        self._adapters.discard(adapter_id)  # first, so that no request for it can be on its way behind the call
        try:
            await self._call(lambda core: core.unload_adapter(adapter_id))
        except EngineError:
            if known:
                self._adapters.add(adapter_id)
            raise

    def stats(self) -> EngineStats:
        """The load after the last step, and what came since. Raises EngineDeadError when the engine is dead."""
        if self._dead is not None:
            raise EngineDeadError(self._dead.message)
        stats = self._thread.load(() if self._waiters is None else self._waiters.requests)
        return msgspec.structs.replace(stats, draining=True) if self._draining else stats

    def kv_events(self) -> list[KvEvent]:
        """Events since the last call, in order."""
        waiting = self._thread.events
        events: list[KvEvent] = []
        while waiting:
            events.append(waiting.popleft())
        return events

    async def drain(self) -> None:
        """Refuses new requests and returns when none is open."""
        self._draining = True
        while self._open:
            self._drained.clear()
            await self._drained.wait()

    async def close(self) -> None:
        """Stops after the step under way; open requests end with `engine_dead`. Idempotent."""
        self._closing = True
        self._thread.stop()
        if self._watch is not None:
            self._watch.cancel()
        await self._thread.join(CLOSE_TIMEOUT_S)
        self.bury(Fault("engine_dead", "the engine was closed", retryable=True))

    # What the thread tells (`thread.Outlet`).

    def deliver(self, deltas: list[StepDelta]) -> None:
        """Once per step."""
        if self._dead is not None:
            return  # every open request has had its terminal delta
        for delta in deltas:
            if delta.finish_reason is not None:
                self._open.pop(delta.request_id, None)
        if not self._open:
            self._drained.set()
        assert self._sink is not None
        self._sink(deltas)

    def bury(self, fault: Fault) -> None:
        """Marks the engine dead; ends whatever is still open."""
        if self._dead is not None:
            return
        self._dead = fault
        if self._waiters is not None:
            self._waiters.close()
        orphans = [
            StepDelta(request_id, attempt, finish_reason="error", fault=fault)
            for request_id, attempt in self._open.items()
        ]
        self._open.clear()
        self._drained.set()
        self._thread.fail_calls(EngineDeadError(fault.message))
        if orphans and self._sink is not None:
            self._sink(orphans)

    def _begin(self, message: GenerateRequest | Constrained) -> None:
        """Sends a request that is open to the thread."""
        if self._num_sent == 1:
            self._busy_since = self._clock()
        self._thread.send(message)

    def _constrained(self, request: GenerateRequest, grammar: Grammar) -> None:
        self._begin(Constrained(request, grammar))

    @property
    def _num_sent(self) -> int:
        """Open requests that the thread has been told of: not those that wait for their grammars."""
        return len(self._open) - (0 if self._waiters is None else len(self._waiters))

    def _watch_progress(self) -> None:
        """A step that never returns cannot report itself."""
        if self.stalled:
            self._thread.stop()
            message = f"work and no progress for {self._clock() - self._progress_at():.1f} s"
            logger.error("engine stalled: %s", message)
            self.bury(Fault("engine_dead", f"the engine stopped: {message}", retryable=True))
        self._stall.look()
        if self._dead is None:
            self._watch = asyncio.get_running_loop().call_later(WATCH_PERIOD_S, self._watch_progress)

    def _progress_at(self) -> float:
        return max(self._thread.progress_at, self._busy_since)

    def _refusal(self, request: GenerateRequest) -> Fault | None:
        if self._dead is not None:
            return self._dead
        if self._draining or self._closing:
            return Fault("draining", "the engine is draining", retryable=True)
        assert self._facts is not None, "submit before start"
        fault = refusal(request, self._facts)
        if fault is not None:
            return fault
        if request.adapter is not None and request.adapter not in self._adapters:
            message = f"adapter {request.adapter} is not loaded here"
            return Fault("adapter_not_found", message, retryable=True, param="model")
        if request.request_id in self._open:
            return Fault("internal", f"request id {request.request_id} is open already")
        if len(self._open) >= self._max_open:
            return Fault("overloaded", f"the engine is full: {len(self._open)} requests are open", retryable=True)
        return None

    async def _call(self, work: Callable[[EngineCore], None]) -> None:
        if self._dead is not None or self._closing or self._facts is None:
            raise EngineDeadError(self._dead.message if self._dead else "the engine is not running")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._thread.send(Call(work, done))
        await done
