"""LoRA adapters around any engine: loaded when first asked for, never taken from whoever uses them.

    submit ─► resident? ─ yes ─► pinned ─► engine.submit ─► … ─► terminal delta ─► unpinned
                 └─ no ─► waits with all others for the one load of its adapter ─┘ or ends with why it failed

The engine itself only loads and unloads what it is told to; which, when and where is decided here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from replicas.adapter_files import Loads
from replicas.adapter_holds import HoldLimits, Holds
from replicas.adapter_loads import AdapterLoader, files_of, not_found
from replicas.adapter_promises import Place, Promises
from replicas.adapter_slots import AdapterSlots
from replicas.adapter_source import AdapterSource
from replicas.adapter_waiters import Waiting, WaitingRoom, terminal
from replicas.contract import (
    AdapterSpec,
    Engine,
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
from routing.waiting import merged

logger = logging.getLogger(__name__)

_DECAY = 0.9
MAX_NOTED_FAILURES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOptions:
    """`max_waiting` bounds requests that wait for loads. A failed load is not tried again for `retry_s`. A prefetched
    adapter keeps its slot for `hold_s`. `clock`: monotonic seconds. `around`: what stands between a load and the
    engine."""

    max_loads: int = 2
    max_waiting: int = 1024
    retry_s: float = 1.0
    hold_s: float = 5.0
    clock: Callable[[], float] = time.monotonic
    around: Callable[[Loads], Loads] = lambda engine: engine


class AdapterEngine:
    """`replicas.contract.Engine` around one that loads adapters when told: requests may name any adapter of `source`.

    An engine without adapter slots is left as it is. `on_change` is called when a load begins or ends, so that whoever
    pushes `stats` can do so at once.
    """

    def __init__(self, engine: Engine, source: AdapterSource, options: AdapterOptions | None = None) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._engine = engine
        self._source = source
        self._options = options or AdapterOptions()
        self._clock = self._options.clock
        self._loads = self._options.around(engine)
        self._room = WaitingRoom()
        self._uses: dict[str, tuple[str, float]] = {}  # request → adapter, since when
        self._use_s = 0.0
        self._paid: dict[str, float] = {}  # request → seconds it waited for its adapter, until that is told
        self._given: dict[str, AdapterSpec] = {}
        self._early: dict[str, int] = {}  # adapter → rank
        self._failed: dict[str, tuple[Fault, float]] = {}
        self._searches: dict[str, asyncio.Task[None]] = {}
        self._sink: StepSink | None = None
        self._draining = False
        self._closing = False
        self._set_up(AdapterSlots(0), 0)

    def _set_up(self, slots: AdapterSlots, max_rank: int) -> None:
        self._slots, self._max_rank = slots, max_rank
        self._loader = AdapterLoader(self._loads, slots, self._options.max_loads, self._clock)
        self._holds = Holds(slots, HoldLimits(self._options.hold_s, max_rank), self._loader.pump)
        self._promises = Promises(Place(slots, self._loader, lambda: self._use_s), self._keep_soon)

    # Engine protocol.

    async def start(self, sink: StepSink) -> EngineFacts:
        """Starts the engine within. Raises EngineError."""
        self._sink = sink
        facts = await self._engine.start(self._deliver)
        self._set_up(AdapterSlots(facts.max_adapters, max_ranks=facts.adapter_pool_ranks), facts.max_adapter_rank)
        self._loader.on_end = self._on_end
        self._loader.on_change = lambda: self.on_change()
        return facts

    def submit(self, request: GenerateRequest) -> None:
        """Accepts a request: exactly one terminal delta follows. Raises RefusedError, then none does."""
        adapter_id = request.adapter
        if adapter_id is None or not self._slots.num_slots:
            self._engine.submit(request)
            return
        self._slots.used(adapter_id, self._clock())
        if self._is_usable(adapter_id):
            self._run(request, adapter_id)
            return
        fault = self._refusal(request, adapter_id) or self._promises.refusal(request, self._spec(adapter_id))
        if fault is not None:
            raise RefusedError(fault)
        self._room.add(adapter_id, Waiting(request, self._clock()))
        self._want(adapter_id)

    def abort(self, request_id: str) -> None:
        """Ends a request with finish_reason `abort`. No-op when finished."""
        if request_id not in self._room:
            self._engine.abort(request_id)
            return
        waiting = self._room.leave(request_id)
        request = waiting.request
        assert request.adapter is not None
        self._promises.given_up(waiting, self._spec(request.adapter), self._clock())
        if request.adapter not in self._room.adapters and request.adapter not in self._promises:
            self._loader.forget(request.adapter)
            if not self._loader.is_under_way(request.adapter):
                self._early.pop(request.adapter, None)
        delta = StepDelta(request_id, request.attempt, finish_reason="abort")
        asyncio.get_running_loop().call_soon(self._emit, [delta])

    async def load_adapter(self, adapter: AdapterSpec) -> None:
        """Returns when the adapter is resident. Raises EngineError when it cannot be loaded."""
        if not self._slots.num_slots:
            await self._engine.load_adapter(adapter)
        elif not self._slots.is_resident(adapter.adapter_id):
            too_large = self._too_large(adapter)
            if too_large is not None:
                raise EngineError(too_large.message)
            self._given[adapter.adapter_id] = adapter
            loaded = self._room.add_caller(adapter.adapter_id)
            self._want(adapter.adapter_id)
            await loaded

    async def unload_adapter(self, adapter_id: str) -> None:
        """Takes an adapter out of its slot. Raises EngineError while it is in use or on its way."""
        self._holds.release(adapter_id)
        if self._loader.is_under_way(adapter_id) or self._slots.is_in_use(adapter_id):
            raise EngineError(f"adapter {adapter_id} is in use")
        self._given.pop(adapter_id, None)
        await self._loader.unload(adapter_id)

    def prefetch(self, adapter_id: str) -> None:
        """A request for it will come soon. Only a hint: at most half of the slots are kept for prefetched adapters,
        all but one for those that the catalogue pins, and the others always have room for one of the largest rank."""
        slots = self._slots
        if self._closing or slots.is_resident(adapter_id) or self._loader.is_under_way(adapter_id):
            return
        spec = self._spec(adapter_id)
        if spec is None or self._too_large(spec) is not None:
            return
        if self._keep_soon(spec):
            self._loader.prefetch(spec)

    def stats(self) -> EngineStats:
        """The engine's load, requests that wait for adapters and the state of the slots included."""
        stats, slots, room = self._engine.stats(), self._slots, self._room
        if not slots.num_slots:
            return stats
        queue_s = self._loader.queue_s()
        if not slots.has_room:  # the first of n uses ends after about 1/n of their mean time
            queue_s += self._use_s / slots.num_slots
        return msgspec.structs.replace(
            stats,
            num_waiting=stats.num_waiting + len(room),
            num_waiting_adapter=len(room),
            num_waiting_tokens=stats.num_waiting_tokens + room.num_tokens,
            waiting_sizes=merged(stats.waiting_sizes, room.sizes()) if len(room) else stats.waiting_sizes,
            adapters=slots.resident,
            loading=self._loader.left(),
            adapter_load_s=self._loader.times.estimate_s(),
            adapter_queue_s=queue_s,
            adapter_loads=self._loader.counts.stats,
        )

    def kv_events(self) -> list[KvEvent]:
        return self._engine.kv_events()

    async def drain(self) -> None:
        """Refuses new requests, lets those that wait for adapters have them, and returns when the last has ended."""
        self._draining = True
        await self._room.empty()
        await self._engine.drain()

    async def close(self) -> None:
        """Stops at once; open requests end with `engine_dead`. Idempotent."""
        self._closing = True
        self._holds.close()
        for task in self._searches.values():
            task.cancel()
        await self._loader.close()
        try:
            await self._engine.close()
        finally:
            for adapter_id in self._room.adapters:
                self._fail(adapter_id, Fault("engine_dead", "the engine was closed", retryable=True))

    # Requests.

    def _refusal(self, request: GenerateRequest, adapter_id: str) -> Fault | None:
        """Why a request may not even wait."""
        if self._draining or self._closing:
            return Fault("draining", "the engine is draining", retryable=True)
        if request.request_id in self._room or request.request_id in self._uses:
            return Fault("internal", f"request id {request.request_id} is open already")
        if len(self._room) >= self._options.max_waiting:
            message = f"the engine is full: {len(self._room)} requests wait for adapters"
            return Fault("overloaded", message, retryable=True)
        if self._slots.is_resident(adapter_id):  # not usable, and not dropped: it is in use
            return not_found(adapter_id, "has other weights now than those that are loaded and still in use")
        fault, until = self._failed.get(adapter_id, (None, 0.0))
        if self._clock() < until:
            return fault
        spec = self._spec(adapter_id)
        return None if spec is None else self._too_large(spec)

    def _run(self, request: GenerateRequest, adapter_id: str) -> None:
        """Gives a request whose adapter is resident to the engine. Raises RefusedError."""
        self._slots.pin(adapter_id)
        try:
            self._engine.submit(request)
        except BaseException:
            self._slots.unpin(adapter_id)
            raise
        self._uses[request.request_id] = (adapter_id, self._clock())
        self._holds.end(adapter_id)
        if not self._holds.is_kept(adapter_id) and self._is_pinned(adapter_id):  # it was pinned after it was loaded
            self._holds.review(self._is_pinned)
            self._holds.keep(adapter_id)

    def _begin(self, waiting: Waiting, adapter_id: str) -> Fault | None:
        """Hands over a request that has waited; returns why it will not run."""
        request, waited_s = waiting.request, self._clock() - waiting.since
        if request.deadline_s is not None:
            left_s = request.deadline_s - waited_s
            if left_s <= 0:
                message = f"the deadline of {request.deadline_s} s passed while adapter {adapter_id} was loaded"
                return Fault("adapter_loading", message, param="model", retry_after_s=0.0)
            request = msgspec.structs.replace(request, deadline_s=left_s)
        self._paid[request.request_id] = waited_s
        try:
            self._run(request, adapter_id)
        except RefusedError as error:
            self._paid.pop(request.request_id, None)
            return error.fault
        except EngineError as error:
            self._paid.pop(request.request_id, None)
            return Fault("engine_dead", str(error), retryable=True)
        except Exception as error:  # our bug, but this request's alone: the others who waited must have theirs
            self._paid.pop(request.request_id, None)
            logger.exception("request %s could not begin", request.request_id)
            return Fault("internal", f"the engine did not take the request: {type(error).__name__}")
        return None

    def _deliver(self, deltas: Sequence[StepDelta]) -> None:
        """The engine's sink."""
        if self._paid:
            for delta in deltas:
                delta.adapter_wait_s = self._paid.pop(delta.request_id, 0.0)
        if self._uses:
            for delta in deltas:
                if delta.finish_reason is not None and delta.request_id in self._uses:
                    adapter_id, since = self._uses.pop(delta.request_id)
                    self._use_s = _DECAY * self._use_s + (1 - _DECAY) * (self._clock() - since)
                    self._slots.unpin(adapter_id)
                    self._leave_if_outdated(adapter_id)
                    self._loader.pump()
        self._emit(deltas)

    def _emit(self, deltas: Sequence[StepDelta]) -> None:
        assert self._sink is not None
        self._sink(deltas)

    # Adapters.

    def _spec(self, adapter_id: str) -> AdapterSpec | None:
        return self._given.get(adapter_id) or self._source.find(adapter_id)

    def _want(self, adapter_id: str) -> None:
        """Sees that the adapter is on its way; one that is unknown here is looked for first."""
        self.drop_outdated()
        self._holds.review(self._is_pinned)
        spec = self._spec(adapter_id)
        if spec is not None:
            self._loader.want(spec)
        elif adapter_id not in self._searches:
            task = asyncio.create_task(self._search(adapter_id), name=f"look for {adapter_id}")
            self._searches[adapter_id] = task
            task.add_done_callback(lambda _: self._searches.pop(adapter_id, None))

    def _is_usable(self, adapter_id: str) -> bool:
        """Whether an adapter is resident, with the weights the catalogue means; with others it is dropped if idle."""
        if not self._slots.is_resident(adapter_id):
            return False
        if not self._is_outdated(adapter_id):
            return True
        self._drop_if_idle(adapter_id)
        return self._slots.is_resident(adapter_id) and self._spec(adapter_id) is None  # removed: those who run, run

    def _is_outdated(self, adapter_id: str) -> bool:
        """Whether the catalogue has no such adapter any more, or means other files."""
        spec, loaded = self._spec(adapter_id), self._loader.loaded_as(adapter_id)
        return spec is None or (loaded is not None and files_of(spec) != files_of(loaded))

    def _drop_if_idle(self, adapter_id: str) -> None:
        self._holds.release(adapter_id)
        if self._slots.is_resident(adapter_id) and not self._slots.is_in_use(adapter_id):
            self._loader.drop(adapter_id)

    def drop_outdated(self) -> None:
        """Takes out what the catalogue has no more and nobody uses; to be called when the catalogue has changed."""
        for adapter_id in self._slots.resident:
            self._leave_if_outdated(adapter_id)

    def _leave_if_outdated(self, adapter_id: str) -> None:
        if self._slots.is_resident(adapter_id) and self._is_outdated(adapter_id):
            self._drop_if_idle(adapter_id)

    def _keep_soon(self, spec: AdapterSpec) -> bool:
        """Whether an adapter that is not here may be held for a while once it is: the others must have room, too."""
        slots = self._slots
        most = slots.num_slots - 1 if spec.pinned else slots.num_slots // 2
        has_room = self._holds.has_room(spec.rank + sum(self._early.values()))
        if self._holds.num_timed + len(self._early) >= most or not has_room:
            return False
        self._early[spec.adapter_id] = spec.rank
        return True

    def _is_pinned(self, adapter_id: str) -> bool:
        spec = self._spec(adapter_id)
        return spec is not None and spec.pinned

    def _too_large(self, spec: AdapterSpec) -> Fault | None:
        """Why an adapter can never be loaded here: it would wait for room in vain."""
        if spec.rank <= self._max_rank:
            return None
        return not_found(spec.adapter_id, f"has rank {spec.rank}, the most is {self._max_rank}")

    async def _search(self, adapter_id: str) -> None:
        """An ingress may have heard of it before this replica did."""
        await self._source.refresh()
        spec = self._spec(adapter_id)
        fault = not_found(adapter_id, "is not in the catalogue") if spec is None else self._too_large(spec)
        if fault is not None:
            self._fail(adapter_id, fault)
        elif spec is not None and adapter_id in self._room.adapters:
            self._loader.want(spec)

    def _on_end(self, adapter_id: str, fault: Fault | None) -> None:
        """A load has ended: everybody who waited for it is answered, once."""
        if fault is not None:
            self._fail(adapter_id, fault)
            return
        waiters = self._room.take(adapter_id)
        self._failed.pop(adapter_id, None)
        self._promises.ended(adapter_id)
        if adapter_id in self._early:
            del self._early[adapter_id]
            if not waiters.requests:
                self._holds.begin(adapter_id)
        if self._is_pinned(adapter_id):
            self._holds.keep(adapter_id)
        for caller in waiters.callers:
            if not caller.done():
                caller.set_result(None)
        faults = [(waiting, self._begin(waiting, adapter_id)) for waiting in waiters.requests.values()]
        refused = [terminal(waiting, fault) for waiting, fault in faults if fault is not None]
        if refused:
            self._emit(refused)

    def _fail(self, adapter_id: str, fault: Fault) -> None:
        """Ends everybody who waits for an adapter, and nobody else."""
        self._early.pop(adapter_id, None)
        self._promises.ended(adapter_id)
        self._failed[adapter_id] = (fault, self._clock() + self._options.retry_s)
        if len(self._failed) > MAX_NOTED_FAILURES:
            del self._failed[next(iter(self._failed))]
        waiters = self._room.take(adapter_id)
        for caller in waiters.callers:
            if not caller.done():
                caller.set_exception(EngineError(fault.message))
        if waiters.requests:
            self._emit([terminal(waiting, fault) for waiting in waiters.requests.values()])
