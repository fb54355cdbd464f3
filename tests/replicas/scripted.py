"""An engine whose every step a test writes down, and small pieces the channel tests share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from replicas.contract import (
    AdapterSpec,
    EngineFacts,
    EngineStats,
    Fault,
    GenerateRequest,
    KvEvent,
    RefusedError,
    SamplingParams,
    StepDelta,
    StepSink,
    pack_tokens,
)

SECRET = b"a secret of the test cluster"
FACTS = EngineFacts(
    engine="scripted",
    model="m",
    vocab_size=1000,
    max_model_len=4096,
    block_size=16,
    num_blocks=64,
    max_num_seqs=512,
    max_num_batched_tokens=512,
    eos_token_ids=(2,),
)


def request(request_id: str, *, attempt: int = 1, max_tokens: int = 8, num_prompt: int = 3) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        attempt=attempt,
        prompt=pack_tokens(range(num_prompt)),
        sampling=SamplingParams(max_tokens=max_tokens, seed=1),
        tenant="acme",
        adapter="lora@3",
        salt=b"salt",
        fair_tag=12.5,
        deadline_s=9.0,
        priority=-1,
    )


class ScriptedEngine:
    """Implements `replicas.contract.Engine`. `step(fn)` makes one step: `fn(request)` writes each open request's delta
    (None: nothing this time). `refuse[original id]` makes submit raise. Token `t` of a request has text `<id>:<t> `."""

    def __init__(self) -> None:
        self.submitted: list[GenerateRequest] = []
        self.open: dict[str, GenerateRequest] = {}
        self.aborted: list[str] = []
        self.refuse: dict[str, Fault] = {}
        self.num_steps = 0
        self.draining = False
        self.closed = False
        self._sink: StepSink | None = None

    async def start(self, sink: StepSink) -> EngineFacts:
        self._sink = sink
        return FACTS

    def submit(self, request: GenerateRequest) -> None:
        for part, fault in self.refuse.items():
            if part in request.request_id:
                raise RefusedError(fault)
        self.submitted.append(request)
        self.open[request.request_id] = request

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        if self.open.pop(request_id, None) is not None:
            asyncio.get_running_loop().call_soon(self._emit, [StepDelta(request_id, finish_reason="abort")])

    def step(self, write: Callable[[GenerateRequest], StepDelta | None]) -> None:
        deltas = [delta for request in list(self.open.values()) if (delta := write(request)) is not None]
        for delta in deltas:
            if delta.finish_reason is not None:
                self.open.pop(delta.request_id, None)
        self.num_steps += 1
        self._emit(deltas)

    def _emit(self, deltas: Sequence[StepDelta]) -> None:
        assert self._sink is not None
        self._sink(deltas)

    async def load_adapter(self, adapter: AdapterSpec) -> None:
        raise NotImplementedError

    async def unload_adapter(self, adapter_id: str) -> None:
        raise NotImplementedError

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.open), num_steps=self.num_steps, num_blocks=64)

    def kv_events(self) -> list[KvEvent]:
        return []

    async def drain(self) -> None:
        self.draining = True
        while self.open:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        self.closed = True
        dead = Fault("engine_dead", "closed")
        self._emit([StepDelta(i, finish_reason="error", fault=dead) for i in self.open])
        self.open.clear()


def counting(num_tokens: int) -> Callable[[GenerateRequest], StepDelta | None]:
    """A step function: request after request gets tokens 0, 1, 2 …, and ends with `length` after `num_tokens`."""
    produced: dict[str, int] = {}

    def write(request: GenerateRequest) -> StepDelta:
        i = produced.get(request.request_id, 0)
        produced[request.request_id] = i + 1
        return StepDelta(
            request.request_id,
            token_ids=(i,),
            text=f"{request.request_id.split('/')[1]}:{i} ",
            finish_reason="length" if i + 1 == num_tokens else None,
            num_cached_tokens=2 if i == 0 else None,
        )

    return write


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Waits until `condition()` is true; fails the test otherwise."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 any condition, not ours alone
            await asyncio.sleep(0.002)
