"""vLLM behind the contract: its engine core's messages, one a step, become one call of the sink.

    submit, abort ─► outgoing, in order ─► engine core (a process) ─► workers
    sink(deltas)  ◄─ one per step ◄─────── outputs

Of `AsyncLLM` the parts on either side of its own request handling are used: its input processor, which validates, and
its client of the engine core. Its handling costs a task and a queue for each request, and a step's outputs would come
apart.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

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
    TokenLogprob,
)
from replicas.engine.stall import StallDetector
from replicas.vllm.adapters import VllmAdapters
from replicas.vllm.deltas import OpenRequest
from replicas.vllm.launch import Launched, Wanted, launch
from replicas.vllm.line import Line
from replicas.vllm.load import VllmLoad
from replicas.vllm.parts import Parts
from replicas.vllm.sampling import Rules
from replicas.vllm.self_check import Scored, self_check

logger = logging.getLogger(__name__)

WATCH_PERIOD_S = 1.0
CALL_TIMEOUT_S = 120.0
"""The longest that loading an adapter may take: a call that the engine core forgets has no end of its own."""


class VllmEngine:
    """`replicas.contract.Engine`. `start` launches vLLM (a minute or more) and checks it.

    Dead when the engine core or a worker ends, or when there is work and no progress for too long: open requests then
    end with `engine_dead`, `submit` refuses, `stats` raises EngineDeadError.
    """

    def __init__(self, wanted: Wanted, clock: Callable[[], float] = time.monotonic) -> None:
        self._wanted = wanted
        self._clock = clock
        self._sink: StepSink | None = None
        self._launched: Launched | None = None
        self._parts: Parts | None = None
        self._open: dict[str, OpenRequest] = {}  # by vLLM's id
        self._ids: dict[str, str] = {}  # ours → vLLM's
        self._outgoing: asyncio.Queue[Awaitable[None]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._progress_at = 0.0
        self._dead: Fault | None = None
        self._died = asyncio.Event()
        self._drained = asyncio.Event()
        self._draining = False
        self._num_calls = 0

    # Engine protocol.

    async def start(self, sink: StepSink) -> EngineFacts:
        """Raises EngineError when vLLM does not start, or computes nonsense here."""
        launched = self._launched = await _launched(self._wanted)
        facts = launched.facts
        core: Any = launched.engine.engine_core
        tasks = [self._read(core), self._send(), self._watch(StallDetector(launched.cpu_s))]
        self._tasks = [asyncio.create_task(task) for task in tasks]
        try:
            supported = await self._ask(launched.engine.get_supported_tasks())
            # Alone on the engine, scoring a prompt is safe even with adapters.
            lenient = Rules(msgspec.structs.replace(facts, prompt_logprobs=True), launched.seeded_resume)
            parts = self._parts = Parts(
                core, launched.engine.input_processor, supported, lenient, facts,
                VllmLoad(facts), Line(self._wanted.config.order), VllmAdapters(core, self._ask, facts.max_adapter_rank),
            )  # fmt: skip
            if self._wanted.config.self_check:
                facts = msgspec.structs.replace(facts, self_check=await self_check(self._run, facts))
            self._parts = msgspec.structs.replace(parts, rules=Rules(facts, launched.seeded_resume), facts=facts)
        except BaseException:
            await self.close()
            raise
        self._sink = sink
        return facts

    def submit(self, request: GenerateRequest) -> None:
        """Accepts a request: exactly one terminal delta follows. Raises RefusedError, then none does."""
        fault = self._refusal(request)
        if fault is not None:
            raise RefusedError(fault)
        assert self._parts is not None, "refused before it has started"
        if request.sampling.max_tokens <= len(request.produced) // 4 or self._is_full(request):
            self._end_at_once(request)
            return
        inner = self._parts.inner(request, self._clock())
        vllm_id: str = inner.request_id
        hidden = frozenset(self._parts.facts.eos_token_ids) - set(request.sampling.stop_token_ids)
        if not self._open:
            self._progress_at = self._clock()
        self._open[vllm_id] = OpenRequest(request, hidden)
        self._ids[request.request_id] = vllm_id
        self._parts.load.submitted(vllm_id, request)
        self._outgoing.put_nowait(self._parts.core.add_request_async(inner))

    def abort(self, request_id: str) -> None:
        """Ends a request with finish_reason `abort`; its blocks are free after the next step. No-op when finished."""
        vllm_id = self._ids.get(request_id)
        if vllm_id is None or self._parts is None:
            return
        attempt = self._open[vllm_id].request.attempt
        self._outgoing.put_nowait(self._parts.core.abort_requests_async([vllm_id]))
        self._forget(vllm_id)
        asyncio.get_running_loop().call_soon(self._deliver, [StepDelta(request_id, attempt, finish_reason="abort")])

    async def load_adapter(self, adapter: AdapterSpec) -> None:
        """Makes an adapter usable; vLLM steps for nobody meanwhile. Raises EngineError when it cannot be loaded."""
        parts = self._running()
        if not parts.facts.max_adapters:
            raise EngineError(f"this engine has no adapter slots: {adapter.adapter_id}")
        await parts.adapters.load(adapter)

    async def unload_adapter(self, adapter_id: str) -> None:
        """Forgets an adapter. Raises EngineError while requests use it."""
        parts = self._running()
        if any(entry.request.adapter == adapter_id for entry in self._open.values()):
            raise EngineError(f"adapter {adapter_id} is in use")
        await parts.adapters.unload(adapter_id)

    def stats(self) -> EngineStats:
        """The load after the last step. Raises EngineDeadError when the engine is dead."""
        parts, launched = self._running(), self._launched
        stats = parts.load.stats()
        kv_seq = 0 if launched is None or launched.events is None else launched.events.seq
        return msgspec.structs.replace(stats, draining=self._draining, kv_seq=kv_seq)

    def kv_events(self) -> list[KvEvent]:
        """Events since the last call, in order."""
        if self._launched is None or self._launched.events is None:
            return []
        return self._launched.events.take()

    async def drain(self) -> None:
        """Refuses new requests and returns when none is open."""
        self._draining = True
        while self._open:
            self._drained.clear()
            await self._drained.wait()

    async def close(self) -> None:
        """Stops at once; open requests end with `engine_dead`. Idempotent."""
        self._bury("the engine was closed")
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        while not self._outgoing.empty():
            _forget_unsent(self._outgoing.get_nowait())
        launched, self._launched = self._launched, None
        if launched is not None:
            await asyncio.to_thread(launched.close)

    # Inside.

    async def _read(self, core: Any) -> None:
        """Every message of the engine core, until it is dead."""
        try:
            while True:
                outputs = await core.get_output_async()
                self._progress_at = self._clock()
                if self._parts is None:
                    continue
                self._parts.load.observe(outputs)
                deltas = [delta for output in outputs.outputs if (delta := self._one(output)) is not None]
                if deltas:
                    self._deliver(deltas)
        except Exception as error:
            logger.error("vLLM ended: %s: %s", type(error).__name__, error)
            self._bury(f"vLLM ended: {type(error).__name__}")

    async def _send(self) -> None:
        """Requests and aborts, in the order in which they were asked for."""
        while True:
            message = await self._outgoing.get()
            try:
                await message
            except Exception as error:
                self._bury(f"vLLM cannot be reached: {type(error).__name__}")

    async def _watch(self, detector: StallDetector) -> None:
        """A step that never returns cannot report itself."""
        while self._dead is None:
            await asyncio.sleep(WATCH_PERIOD_S)
            if self._open and not self._num_calls and self._parts is not None:
                now, predicted_s = self._clock(), self._parts.load.predicted_step_s
                if detector.stalled(now, self._progress_at, predicted_s):
                    self._bury(f"work and no progress for {now - self._progress_at:.1f} s")
                    if self._launched is not None:
                        self._launched.kill()
            detector.look()

    def _one(self, output: Any) -> StepDelta | None:
        """A request's delta; what cannot be understood ends that request alone."""
        entry = self._open.get(output.request_id)
        try:
            return self._delta(output)
        except Exception as error:
            logger.exception("an output of vLLM's for %s cannot be understood", output.request_id)
            if entry is None or self._parts is None:
                return None
            if output.request_id in self._open:
                self._outgoing.put_nowait(self._parts.core.abort_requests_async([output.request_id]))
                self._forget(output.request_id)
            fault = Fault("internal", f"vLLM's output cannot be understood: {type(error).__name__}", retryable=True)
            return StepDelta(entry.request.request_id, entry.request.attempt, finish_reason="error", fault=fault)

    def _delta(self, output: Any) -> StepDelta | None:
        entry = self._open.get(output.request_id)
        if entry is None:
            return None  # aborted; vLLM had not heard yet
        assert self._parts is not None
        delta = entry.delta(output)
        if delta.num_cached_tokens is not None:
            num_prompt = entry.request.num_prompt_tokens
            self._parts.load.begun(output.request_id, num_prompt, delta.num_cached_tokens)
        if delta.finish_reason is not None:
            self._forget(output.request_id)
        return delta

    def _forget(self, vllm_id: str) -> None:
        entry = self._open.pop(vllm_id)
        del self._ids[entry.request.request_id]
        assert self._parts is not None
        self._parts.load.ended(vllm_id)
        if not self._open:
            self._drained.set()

    def _deliver(self, deltas: Sequence[StepDelta]) -> None:
        if self._sink is not None:
            self._sink(deltas)

    def _bury(self, why: str) -> None:
        """Marks the engine dead; ends whatever is still open."""
        if self._dead is not None:
            return
        fault = self._dead = Fault("engine_dead", why, retryable=True)
        entries = list(self._open.values())
        self._open.clear()
        self._ids.clear()
        self._died.set()
        self._drained.set()
        ended = [
            StepDelta(entry.request.request_id, entry.request.attempt, finish_reason="error", fault=fault)
            for entry in entries
        ]
        if ended:
            self._deliver(ended)

    def _refusal(self, request: GenerateRequest) -> Fault | None:
        if self._dead is not None:
            return self._dead
        if self._draining or self._parts is None:
            return Fault("draining", "the engine is draining", retryable=True)
        parts = self._parts
        fault = parts.rules.refusal(request)
        if fault is not None:
            return fault
        if request.adapter is not None and request.adapter not in parts.adapters:
            message = f"adapter {request.adapter} is not loaded here"
            return Fault("adapter_not_found", message, retryable=True, param="model")
        if request.request_id in self._ids:
            return Fault("internal", f"request id {request.request_id} is open already")
        if len(self._open) >= parts.facts.max_num_seqs + self._wanted.config.max_waiting:
            return Fault("overloaded", f"the engine is full: {len(self._open)} requests are open", retryable=True)
        return None

    def _is_full(self, request: GenerateRequest) -> bool:
        assert self._parts is not None
        return (len(request.prompt) + len(request.produced)) // 4 >= self._parts.facts.max_model_len

    def _end_at_once(self, request: GenerateRequest) -> None:
        """A resumed answer that has nothing more to come."""
        delta = StepDelta(request.request_id, request.attempt, finish_reason="length", num_cached_tokens=0)
        asyncio.get_running_loop().call_soon(self._deliver, [delta])

    def _running(self) -> Parts:
        if self._dead is not None or self._parts is None:
            raise EngineDeadError(self._dead.message if self._dead else "the engine is not running")
        return self._parts

    async def _ask(self, answer: Awaitable[Any]) -> Any:
        """An answer of the engine core, which is never given when it dies first."""
        asked = asyncio.ensure_future(answer)
        died = asyncio.ensure_future(self._died.wait())
        self._num_calls += 1
        try:
            await asyncio.wait((asked, died), timeout=CALL_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            if self._dead is not None:
                raise EngineDeadError(self._dead.message)
            raise EngineError(f"no answer of vLLM in {CALL_TIMEOUT_S:.0f} s")
        finally:
            self._num_calls -= 1
            self._progress_at = self._clock()
            for future in (asked, died):
                future.cancel()

    async def _run(self, request: GenerateRequest) -> Scored:
        """One request to its end, before anybody else's."""
        token_ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        prompt_logprobs: list[TokenLogprob | None] = []
        ended: asyncio.Future[StepDelta] = asyncio.get_running_loop().create_future()

        def take(deltas: Sequence[StepDelta]) -> None:
            for delta in deltas:
                token_ids.extend(delta.token_ids)
                logprobs.extend(delta.logprobs or ())
                prompt_logprobs.extend(delta.prompt_logprobs or ())
                if delta.finish_reason is not None and not ended.done():
                    ended.set_result(delta)

        self._sink = take
        self.submit(request)
        last = await ended
        if last.fault is not None:
            raise EngineError(f"the self-check failed: {last.fault.message}")
        return Scored(tuple(token_ids), tuple(logprobs), tuple(prompt_logprobs))


async def _launched(wanted: Wanted) -> Launched:
    """Launches beside the event loop. Whoever stops waiting leaves nothing running."""
    launching = asyncio.ensure_future(asyncio.to_thread(launch, wanted))
    try:
        return await asyncio.shield(launching)
    except asyncio.CancelledError:
        with contextlib.suppress(EngineError):
            await asyncio.to_thread((await launching).close)
        raise


def _forget_unsent(message: Awaitable[None]) -> None:
    """A coroutine that nobody awaits complains when it is collected."""
    with contextlib.suppress(AttributeError):
        message.close()  # type: ignore[attr-defined]
