"""A server that runs already, as a replica: whatever speaks OpenAI's `/v1/completions` (vLLM, SGLang, llama.cpp, …).

    submit ─► POST /v1/completions, streamed ─► deltas          health: GET /health      load: GET /metrics, where known

Prompts go over as token ids. The answer's text is the server's own, stop strings are looked for there. What its prefix
cache holds is guessed from what was sent to it (`replicas.foreign.mirror`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from time import monotonic

import httpx

from configs.grammars.source import GrammarError
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
    cache_namespace,
)
from replicas.engine.limits import refusal
from replicas.foreign.flavours import Flavour, Gauges, read_gauges
from replicas.foreign.mirror import PrefixMirror
from replicas.foreign.server import Upstream, get_to_know
from replicas.foreign.wire import StreamReader, beyond, body_of, status_fault
from routing.waiting import merged

logger = logging.getLogger(__name__)

MAX_MISSES = 3
"""Health checks in a row that may fail before the server counts as dead."""

_TIMEOUT = httpx.Timeout(10.0, read=None, pool=None)
_RATE_DECAY = 0.9
_MAX_LINE_BYTES = 4 << 20


@dataclass(slots=True)
class _Call:
    """A request that the server has, or will have."""

    request: GenerateRequest
    reader: StreamReader
    task: asyncio.Task[None] | None = None
    has_ended: bool = False

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The `data:` of each event. Lines end at newlines alone: JSON may hold what else counts as the end of a line."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            raise ValueError(f"an event of more than {_MAX_LINE_BYTES} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


class OpenAiEngine:
    """`replicas.contract.Engine`, text included. `start` waits until the server is there, however long that takes; when
    it is gone the engine is dead, and the replica is replaced by one that waits for it again."""

    def __init__(self, upstream: Upstream, clock: Callable[[], float] = monotonic) -> None:
        self._upstream = upstream
        self._clock = clock
        self._client: httpx.AsyncClient | None = None
        self._flavour: Flavour | None = None
        self._facts: EngineFacts | None = None
        self._model = ""
        self._mirror = PrefixMirror(1, 1)
        self._events: list[KvEvent] = []
        self._sink: StepSink | None = None
        self._pending: list[StepDelta] = []
        self._running: dict[str, _Call] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[str, int] = {}  # no answer yet → prompt tokens
        self._gauges = Gauges()
        self._rate = 0.0
        self._counts = [0, 0]  # prompt tokens, output tokens
        self._num_events = 0
        self._dead: Fault | None = None
        self._draining = False
        self._idle = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    # Engine protocol.

    async def start(self, sink: StepSink) -> EngineFacts:
        """Raises EngineError when the server lacks the model, or takes no prompts as token ids."""
        place = self._upstream.place
        key = os.environ.get(place.api_key_env) if place.api_key_env else None
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        client = self._client = httpx.AsyncClient(
            base_url=place.url.rstrip("/"), headers=headers, timeout=_TIMEOUT, limits=limits, trust_env=False
        )
        try:
            self._sink = sink
            server = await get_to_know(client, self._upstream)
        except BaseException:
            await client.aclose()
            raise
        self._flavour, self._model, facts = server.flavour, server.model, server.facts
        self._facts = facts
        self._mirror = PrefixMirror(facts.block_size, facts.num_blocks)
        self._watch = asyncio.create_task(self._watch_over(client, self._flavour))
        return facts

    def submit(self, request: GenerateRequest) -> None:
        """Accepts a request: exactly one terminal delta follows. Raises RefusedError, then none does."""
        fault = self._refusal(request)
        if fault is not None:
            raise RefusedError(fault)
        assert self._flavour is not None
        try:
            body = body_of(request, self._model, self._flavour)
        except GrammarError as error:
            param = request.sampling.constraint.param if request.sampling.constraint else None
            raise RefusedError(Fault("invalid_grammar", error.message, param=param)) from error
        call = _Call(request, StreamReader(request, self._upstream.files.tokenizer))
        self._waiting[request.request_id] = request.num_prompt_tokens
        self._running[request.request_id] = call
        call.task = asyncio.create_task(self._answer(call, body))
        self._tasks.add(call.task)
        call.task.add_done_callback(self._tasks.discard)

    def abort(self, request_id: str) -> None:
        """Ends a request with finish_reason `abort`; the connection is closed. No-op when finished."""
        call = self._running.get(request_id)
        if call is not None:
            self._end(call, StepDelta(request_id, call.request.attempt, finish_reason="abort"))
            call.cancel()

    async def load_adapter(self, adapter: AdapterSpec) -> None:
        raise EngineError(f"adapters of a foreign server are its own: {adapter.adapter_id}")

    async def unload_adapter(self, adapter_id: str) -> None:
        raise EngineError(f"adapters of a foreign server are its own: {adapter_id}")

    def stats(self) -> EngineStats:
        """Own requests, and what the server says of others' too. Raises EngineDeadError when it is gone."""
        if self._dead is not None or self._facts is None:
            raise EngineDeadError(self._dead.message if self._dead else "the engine is not running")
        sizes = list(self._waiting.values())
        num_answering = len(self._running) - len(sizes)
        num_blocks = self._facts.num_blocks
        return EngineStats(
            num_running=max(num_answering, self._gauges.num_running - len(sizes)),
            num_waiting=max(len(sizes), self._gauges.num_waiting),
            num_waiting_tokens=sum(sizes),
            waiting_sizes=merged((), sizes),
            num_free_blocks=round((1.0 - self._gauges.usage) * num_blocks),
            num_blocks=num_blocks,
            num_steps=self._num_events,
            num_prompt_tokens=self._counts[0],
            num_output_tokens=self._counts[1],
            prefill_tokens_per_s=self._rate,
            kv_seq=self._mirror.seq,
            draining=self._draining,
        )

    def kv_events(self) -> list[KvEvent]:
        events, self._events = self._events, []
        return events

    async def drain(self) -> None:
        self._draining = True
        while self._running:
            self._idle.clear()
            await self._idle.wait()

    async def close(self) -> None:
        """Stops at once; open requests end with `engine_dead`. Idempotent."""
        self._bury("the engine was closed")
        if self._watch is not None:
            self._watch.cancel()
        tasks = [task for task in (*self._tasks, self._watch) if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        self._flush()
        if self._client is not None:
            await self._client.aclose()

    # Inside.

    async def _watch_over(self, client: httpx.AsyncClient, flavour: Flavour) -> None:
        """Health and load, every so often."""
        misses = 0
        while self._dead is None:
            await asyncio.sleep(self._upstream.place.health_period_s)
            try:
                is_there = (await client.get("/health", timeout=5.0)).status_code < 500
            except httpx.HTTPError:
                is_there = False
            if is_there and flavour.gauges is not None:
                await self._look_at_load(client, flavour.gauges)
            misses = 0 if is_there else misses + 1
            if misses >= MAX_MISSES:
                self._bury(f"{self._upstream.place.url} has not answered {misses} health checks")

    async def _look_at_load(self, client: httpx.AsyncClient, names: tuple[str, str, str]) -> None:
        """Metrics that are slow, or cannot be read, say nothing of the server's health."""
        with contextlib.suppress(httpx.HTTPError, ValueError):
            self._gauges = read_gauges((await client.get("/metrics", timeout=5.0)).text, names)

    async def _answer(self, call: _Call, body: bytes) -> None:
        """One request to its terminal delta, unless that came from elsewhere."""
        try:
            await self._stream(call, body)
            self._fail(call, "upstream_lost", "the server's stream broke off")
        except httpx.TransportError as error:
            self._fail(call, "upstream_lost", f"the server broke off: {type(error).__name__}: {error}"[:300])
        except Exception as error:  # whatever it is, it is this request's alone
            self._fail(call, "internal", f"the server failed: {type(error).__name__}: {error}"[:300])

    async def _stream(self, call: _Call, body: bytes) -> None:
        assert self._client is not None
        sent_at = self._clock()
        headers = {"content-type": "application/json"}
        async with self._client.stream("POST", "/v1/completions", content=body, headers=headers) as reply:
            if reply.status_code != httpx.codes.OK:
                fault = status_fault(reply.status_code, (await reply.aread()).decode(errors="replace"))
                if fault.code == "internal":  # a wrong key, a model that is gone: whoever runs this should know
                    logger.warning("%s: %s", self._upstream.place.url, fault.message)
                self._end(call, call.reader.failure(fault))
                return
            async for data in _events(reply.aiter_bytes()):
                delta = call.reader.delta(data)
                if delta is None:
                    continue
                if delta.num_cached_tokens is not None:
                    self._begun(call.request, self._clock() - sent_at)
                self._counts[1] += len(delta.token_ids)
                if delta.finish_reason is not None:
                    self._end(call, delta)
                    return
                if not call.has_ended:
                    self._emit(delta)

    def _fail(self, call: _Call, code: str, why: str) -> None:
        self._end(call, call.reader.failure(Fault(code, why, retryable=True)))

    def _end(self, call: _Call, delta: StepDelta) -> None:
        """The one terminal delta; no-op after it."""
        if call.has_ended:
            return
        call.has_ended = True
        self._running.pop(call.request.request_id, None)
        self._waiting.pop(call.request.request_id, None)
        if not self._running:
            self._idle.set()
        self._emit(delta)

    def _begun(self, request: GenerateRequest, seconds: float) -> None:
        """The first token: the prompt is computed, and in the server's cache."""
        self._waiting.pop(request.request_id, None)
        self._counts[0] += request.num_prompt_tokens
        rate = request.num_prompt_tokens / max(seconds, 1e-6)
        self._rate = rate if self._rate == 0.0 else _RATE_DECAY * self._rate + (1 - _RATE_DECAY) * rate
        if self._facts is not None and self._facts.events:
            self._events += self._mirror.seen(request.prompt, cache_namespace(None, request.salt))

    def _emit(self, delta: StepDelta) -> None:
        """Deltas of one turn of the loop leave together."""
        if not self._pending:
            asyncio.get_running_loop().call_soon(self._flush)
        self._pending.append(delta)

    def _flush(self) -> None:
        deltas: Sequence[StepDelta] = self._pending
        self._pending = []
        if deltas and self._sink is not None:
            self._num_events += 1
            self._sink(deltas)

    def _bury(self, why: str) -> None:
        if self._dead is None:
            fault = self._dead = Fault("engine_dead", why, retryable=True)
            for call in list(self._running.values()):
                self._end(call, call.reader.failure(fault))
                call.cancel()

    def _refusal(self, request: GenerateRequest) -> Fault | None:
        if self._dead is not None:
            return self._dead
        if self._draining or self._facts is None or self._flavour is None:
            return Fault("draining", "the engine is draining", retryable=True)
        fault = refusal(request, self._facts) or next(beyond(request.sampling, self._flavour), None)
        if fault is not None:
            return fault
        if request.request_id in self._running:
            return Fault("internal", f"request id {request.request_id} is open already")
        if len(self._running) >= self._facts.max_num_seqs + self._upstream.config.max_waiting:
            return Fault("overloaded", f"{len(self._running)} requests are open", retryable=True)
        return None
