"""Loading adapters into slots: a few at a time, in the order asked for, with what each load takes learnt on the way.

want ─► queue (requests', then prefetches) ─► a loader and a slot are free ─► unload the evicted ─► load ─► end

Slots are counted free before the engine has unloaded: so unloads, and loads before they begin, go one after another.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from replicas.adapter_counts import LoadCounts, LoadTimes
from replicas.adapter_files import AdapterUnreachableError, Loads
from replicas.adapter_slots import AdapterSlots
from replicas.contract import AdapterSpec, EngineDeadError, EngineError, Fault

log = logging.getLogger(__name__)

UNREACHABLE_S = 5.0
"""When to ask again for an adapter whose files could not be read."""


@dataclass(slots=True)
class _Load:
    """One adapter on its way. `began` once it has a loader and a slot."""

    spec: AdapterSpec
    began: float | None = None


class AdapterLoader:
    """Loads what is wanted. `on_end(adapter_id, fault)` once for each that was begun; `on_change()` when a load begins
    or ends. All on one event loop."""

    def __init__(self, engine: Loads, slots: AdapterSlots, max_loads: int, clock: Callable[[], float]) -> None:
        self.times = LoadTimes()
        self.counts = LoadCounts()
        self.on_end: Callable[[str, Fault | None], None] = lambda adapter_id, fault: None
        self.on_change: Callable[[], None] = lambda: None
        self._engine = engine
        self._slots = slots
        self._max_loads = max_loads
        self._clock = clock
        self._wanted: dict[str, _Load] = {}
        self._early: dict[str, _Load] = {}
        self._begun: dict[str, _Load] = {}
        self._loaded: dict[str, AdapterSpec] = {}
        self._unloading = asyncio.Lock()  # first come, first served
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def is_under_way(self, adapter_id: str) -> bool:
        """Begun or queued."""
        return adapter_id in self._begun or adapter_id in self._wanted or adapter_id in self._early

    def loaded_as(self, adapter_id: str) -> AdapterSpec | None:
        """What a resident adapter was loaded from."""
        return self._loaded.get(adapter_id)

    def want(self, spec: AdapterSpec) -> None:
        """A request waits for it: after those wanted before, before every prefetch. Idempotent."""
        if spec.adapter_id in self._begun or spec.adapter_id in self._wanted:
            return
        self._early.pop(spec.adapter_id, None)
        self._wanted[spec.adapter_id] = _Load(spec)
        self.pump()

    def prefetch(self, spec: AdapterSpec) -> None:
        """Somebody will want it soon: loaded when no request waits for a loader. Idempotent."""
        if not self.is_under_way(spec.adapter_id):
            self._early[spec.adapter_id] = _Load(spec)
            self.pump()

    def forget(self, adapter_id: str) -> None:
        """Nobody wants it any more; a load that has begun goes on."""
        self._wanted.pop(adapter_id, None)

    def pump(self) -> None:
        """Begins what can begin; to be called when a slot may have become free."""
        while len(self._begun) < self._max_loads and not self._closed:
            queue = self._wanted or self._early
            if not queue:
                return
            adapter_id = next(iter(queue))
            claim = self._slots.claim(adapter_id, queue[adapter_id].spec.rank)
            if claim is None:
                return
            load = self._begun[adapter_id] = queue.pop(adapter_id)
            load.began = self._clock()
            self.counts.evicted(len(claim.evicted))
            for evicted in claim.evicted:
                self._loaded.pop(evicted, None)
            self._spawn(self._run(load, claim.evicted), f"load {adapter_id}")
            self.on_change()

    async def unload(self, adapter_id: str) -> None:
        """Takes an idle resident adapter out, after every unload begun before. Raises EngineError."""
        self._loaded.pop(adapter_id, None)
        if self._slots.is_resident(adapter_id):
            self._slots.drop(adapter_id)
        await self._unload(adapter_id)

    def drop(self, adapter_id: str) -> None:
        """`unload` of one that is of no use any more; nobody waits for it."""
        self._loaded.pop(adapter_id, None)
        self._slots.drop(adapter_id)
        self._spawn(self._drop(adapter_id), f"unload {adapter_id}")

    def left(self) -> tuple[tuple[str, float], ...]:
        """Those under way, with the seconds each has probably left."""
        now = self._clock()
        found = [(name, self._left_s(load, now)) for name, load in self._begun.items()]
        wait_s = min((s for _, s in found), default=0.0) if len(found) >= self._max_loads else 0.0
        for name, load in (*self._wanted.items(), *self._early.items()):
            own_s = self.times.estimate_s(load.spec.rank)
            found.append((name, wait_s + own_s))
            wait_s += own_s / self._max_loads
        return tuple(found)

    def queue_s(self) -> float:
        """Seconds before one asked for now would have a loader."""
        now = self._clock()
        left = [self._left_s(load, now) for load in self._begun.values()]
        wait_s = min(left) if len(left) >= self._max_loads else 0.0
        return wait_s + sum(self.times.estimate_s(load.spec.rank) for load in self._wanted.values()) / self._max_loads

    def expected_s(self, spec: AdapterSpec) -> float | None:
        """Seconds until an adapter that is wanted now would be there, slots aside; None while no load was measured."""
        if not self.times.known:
            return None
        left = dict(self.left()).get(spec.adapter_id)
        return self.queue_s() + self.times.estimate_s(spec.rank) if left is None else left

    def has_begun(self, adapter_id: str) -> bool:
        """Whether it has a slot, and is being loaded."""
        return adapter_id in self._begun

    async def close(self) -> None:
        """Begins nothing more and gives up what is under way, without a word to anybody. Idempotent."""
        self._closed = True
        self._wanted.clear()
        self._early.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _left_s(self, load: _Load, now: float) -> float:
        assert load.began is not None
        return max(0.0, self.times.estimate_s(load.spec.rank) - (now - load.began))

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _unload(self, adapter_id: str) -> None:
        async with self._unloading:
            await self._engine.unload_adapter(adapter_id)
        self.pump()

    async def _drop(self, adapter_id: str) -> None:
        try:
            await self._unload(adapter_id)
        except EngineError as error:
            log.warning("adapter %s cannot be unloaded: %s", adapter_id, error)

    async def _run(self, load: _Load, evicted: tuple[str, ...]) -> None:
        adapter_id = load.spec.adapter_id
        fault = await self._load(load.spec, evicted)
        del self._begun[adapter_id]
        if fault is None:
            self._slots.loaded(adapter_id)
            self._loaded[adapter_id] = load.spec
        else:
            self._slots.failed(adapter_id)
            self.counts.failed()
        self.on_end(adapter_id, fault)
        self.on_change()
        self.pump()

    async def _load(self, spec: AdapterSpec, evicted: tuple[str, ...]) -> Fault | None:
        """Makes the engine do it; returns why it could not."""
        try:
            async with self._unloading:  # one that evicts nobody may count on room that is still being made
                for name in evicted:
                    await self._engine.unload_adapter(name)
            began = self._clock()
            await self._engine.load_adapter(spec)
        except EngineDeadError as error:
            return Fault("engine_dead", str(error), retryable=True)
        except AdapterUnreachableError as error:
            log.warning("adapter %s cannot be fetched: %s", spec.adapter_id, error)
            message = f"adapter {spec.adapter_id} cannot be fetched now: {error}"
            return Fault("adapter_unreachable", message, retryable=True, retry_after_s=UNREACHABLE_S)
        except Exception as error:  # one adapter's files must not harm the others
            if not isinstance(error, (EngineError, OSError)):
                log.exception("loading %s failed", spec.adapter_id)
            log.warning("adapter %s cannot be loaded: %s", spec.adapter_id, error)
            return not_found(spec.adapter_id, f"cannot be loaded: {error}")
        seconds = self._clock() - began
        self.times.observe(spec.rank, seconds)
        self.counts.loaded(seconds)
        return None


def not_found(adapter_id: str, why: str) -> Fault:
    """This replica cannot serve the adapter; another may."""
    return Fault("adapter_not_found", f"adapter {adapter_id} {why}", retryable=True, param="model")


def files_of(spec: AdapterSpec) -> tuple[str, str, int]:
    """What tells one adapter's files from another's."""
    return spec.digest, spec.path, spec.rank
