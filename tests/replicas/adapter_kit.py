"""An engine that loads adapters when a test says so, and refuses to run a request whose adapter it does not hold."""

from __future__ import annotations

import asyncio

import msgspec

from replicas.adapters import AdapterEngine, AdapterOptions
from replicas.contract import (
    AdapterSpec,
    EngineError,
    EngineFacts,
    EngineStats,
    Fault,
    GenerateRequest,
    RefusedError,
    StepDelta,
    StepSink,
)
from tests.replicas.engine_kit import VirtualClock, make_request
from tests.replicas.scripted import FACTS, ScriptedEngine

MAX_RANK = 64


class LoadingEngine(ScriptedEngine):
    """`loads` are under way until `finish`; slots are counted as an engine would. Unloads wait for `unload_gate`."""

    def __init__(self, num_slots: int, num_ranks: int | None) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.num_ranks = num_slots * MAX_RANK if num_ranks is None else num_ranks
        self.unload_gate = asyncio.Event()
        self.unload_gate.set()
        self.loads: dict[str, asyncio.Future[None]] = {}
        self.resident: list[str] = []
        self.num_loads = 0

    async def start(self, sink: StepSink) -> EngineFacts:
        await super().start(sink)
        ranks = {"max_adapter_rank": MAX_RANK, "adapter_pool_ranks": self.num_ranks}
        return msgspec.structs.replace(FACTS, max_adapters=self.num_slots, **ranks)

    def submit(self, request: GenerateRequest) -> None:
        if request.adapter is not None and request.adapter not in self.resident:
            raise RefusedError(Fault("adapter_not_found", "the wrapper let it through"))
        super().submit(request)

    async def load_adapter(self, adapter: AdapterSpec) -> None:
        self.num_loads += 1
        self.loads[adapter.adapter_id] = asyncio.get_running_loop().create_future()
        try:
            await self.loads[adapter.adapter_id]
        finally:
            del self.loads[adapter.adapter_id]
        if len(self.resident) >= self.num_slots:
            raise EngineError("no slot is free")
        self.resident.append(adapter.adapter_id)

    async def unload_adapter(self, adapter_id: str) -> None:
        assert all(r.adapter != adapter_id for r in self.open.values()), f"{adapter_id} is in use"
        await self.unload_gate.wait()
        self.resident.remove(adapter_id)

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.open))


class Shelf:
    """An `AdapterSource` that knows what a test puts there; what is `late` is found by `refresh` only."""

    def __init__(self, *names: str) -> None:
        self.specs = {name: AdapterSpec(adapter_id=name) for name in names}
        self.late: dict[str, AdapterSpec] = {}
        self.num_refreshes = 0

    def find(self, adapter_id: str) -> AdapterSpec | None:
        return self.specs.get(adapter_id)

    async def refresh(self) -> None:
        self.num_refreshes += 1
        await asyncio.sleep(0)
        self.specs.update(self.late)


class AdapterKit:
    """The wrapper around a loading engine; `deltas` by request."""

    def __init__(self, num_slots: int = 2, max_loads: int = 2, num_ranks: int | None = None, **options: float) -> None:
        self.clock = VirtualClock()
        self.inner = LoadingEngine(num_slots, num_ranks)
        self.shelf = Shelf(*(f"{name}@1" for name in "abcdefgh"))
        chosen = AdapterOptions(max_loads=max_loads, clock=self.clock, **options)  # type: ignore[arg-type]
        self.engine = AdapterEngine(self.inner, self.shelf, chosen)
        self.deltas: dict[str, list[StepDelta]] = {}
        self.num_changes = 0

    async def start(self) -> AdapterKit:
        self.engine.on_change = self._changed
        await self.engine.start(self._take)
        return self

    def _changed(self) -> None:
        self.num_changes += 1

    def _take(self, deltas: object) -> None:
        for delta in deltas:  # type: ignore[attr-defined]
            assert not self.ended(delta.request_id), f"{delta.request_id} was answered twice"
            self.deltas[delta.request_id].append(delta)

    def ask(self, request_id: str, adapter: str | None, **changes: object) -> None:
        """Raises RefusedError."""
        self.deltas.setdefault(request_id, [])
        self.engine.submit(make_request(request_id, range(3), adapter=adapter, **changes))

    def ended(self, request_id: str) -> bool:
        deltas = self.deltas.get(request_id)
        return bool(deltas) and deltas[-1].finish_reason is not None

    def fault(self, request_id: str) -> Fault | None:
        return self.deltas[request_id][-1].fault

    async def finish(self, adapter: str, error: Exception | None = None, took_s: float = 0.0) -> None:
        """Ends a load that is under way."""
        self.clock.sleep(took_s)
        load = self.inner.loads[adapter]
        if error is None:
            load.set_result(None)
        else:
            load.set_exception(error)
        await settle()

    async def end(self, *request_ids: str) -> None:
        """The engine answers these, and they are over."""
        self.inner.step(
            lambda r: (
                StepDelta(r.request_id, token_ids=(1,), finish_reason="stop") if r.request_id in request_ids else None
            )
        )
        await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)
