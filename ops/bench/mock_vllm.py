"""A lean mock of vLLM's HTTP server: the same routes and bytes, no model, adjustable misbehaviour.

`python -m ops.bench.mock_vllm --port 0` prints one JSON line with its URL and serves until it is ended; tests run
`MockVllm` in process with `ops.bench.asgi.serve_asgi`. `POST /mock/behaviour` changes it while it runs and
`GET /mock/counts` says what it has seen. Every answer names its worker in `X-Worker-Id`.

Paced streams share one clock, as the sequences of an engine share its steps: every interval all of them get a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, NoReturn

import click
import msgspec
import uvloop
from msgspec import Meta

from ops.bench.asgi import AsgiApp, Exchange, Receive, Scope, Send, serve_asgi
from ops.bench.mock_wire import Generation, GenerationBody, StreamOptions, error_body, rendered

VERSION = "0.32.0"
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0)]


class Behaviour(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the mock answers generation requests.

    `stop_after`: tokens after which an answer ends by itself (`stop`); a smaller `max_tokens` ends it with `length`.
    `chunk_interval_s` 0 is unpaced: one loop turn a token. `chunks_per_write`: tokens that leave in one write.
    `fail_first`: that many requests get `fail_status`; then `status` holds for all. `crash_on_request`: the n-th
    request (from 1) crashes the worker before any answer; `crash_after_chunks`: any stream does after that many tokens.
    """

    model: str = "mock"
    owner: str = "vllm"
    worker_id: str = "mock-0"
    max_model_len: Annotated[int, Meta(ge=1)] = 32768
    stop_after: Annotated[int, Meta(ge=1)] = 16
    ttft_s: Seconds = 0.0
    chunk_interval_s: Seconds = 0.0
    chunks_per_write: Annotated[int, Meta(ge=1)] = 1
    render_s: Seconds = 0.0
    fail_first: Count = 0
    fail_status: Annotated[int, Meta(ge=400, le=599)] = 503
    status: Annotated[int, Meta(ge=200, le=599)] = 200
    retry_after_s: Count | None = None
    crash_on_request: Annotated[int, Meta(ge=1)] | None = None
    crash_after_chunks: Count | None = None
    healthy: bool = True


class Counts(msgspec.Struct):
    """What the mock has seen: generation requests, answers refused on purpose, renders, tokens written, open and
    abandoned streams."""

    requests: int = 0
    refused: int = 0
    renders: int = 0
    tokens: int = 0
    running: int = 0
    aborted: int = 0
    by_path: dict[str, int] = msgspec.field(default_factory=dict)


class MockCrashError(Exception):
    """The in-process form of a crash: the connection is cut without an end."""


def crash_connection(exchange: Exchange) -> NoReturn:
    exchange.cut()
    raise MockCrashError("the mock was told to crash")


def crash_process(_: Exchange) -> NoReturn:
    os._exit(70)


class StepClock:
    """Ticks every `interval_s` while somebody waits; all waiters of a tick wake together."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self._tick: asyncio.Event | None = None
        self._last_s = 0.0

    async def wait(self) -> None:
        if self._tick is None:
            loop = asyncio.get_running_loop()
            self._tick = asyncio.Event()
            # Counted from the last tick, not from the clock: timers may fire a little early.
            due, now = self._last_s + self.interval_s, loop.time()
            self._last_s = due if due >= now else now + self.interval_s
            loop.call_at(self._last_s, self._fire)
        await self._tick.wait()

    def _fire(self) -> None:
        assert self._tick is not None
        tick, self._tick = self._tick, None
        tick.set()


class MockVllm:
    """The ASGI app. `crash` is called where the behaviour says crash; it must not return."""

    def __init__(self, behaviour: Behaviour, crash: Callable[[Exchange], NoReturn] = crash_connection) -> None:
        self.behaviour = behaviour
        self.counts = Counts()
        self._crash = crash
        self._clock = StepClock(behaviour.chunk_interval_s)
        self._routes: dict[tuple[str, str], Callable[[Exchange], Awaitable[None]]] = {
            ("POST", "/v1/chat/completions"): self._generate,
            ("POST", "/v1/completions"): self._generate,
            ("POST", "/v1/chat/completions/render"): self._render,
            ("POST", "/v1/completions/render"): self._render,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/detokenize"): self._detokenize,
            ("GET", "/v1/models"): self._models,
            ("GET", "/health"): self._health,
            ("GET", "/version"): self._version,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/mock/counts"): self._counts,
            ("POST", "/mock/behaviour"): self._change,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send, ((b"x-worker-id", self.behaviour.worker_id.encode()),))
        path = scope["path"]
        self.counts.by_path[path] = self.counts.by_path.get(path, 0) + 1
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        handler = self._routes.get((method, path))
        if handler is None:
            await exchange.answer(404, b'{"detail":"Not Found"}')
            return
        try:
            await handler(exchange)
        except msgspec.MsgspecError as error:
            await exchange.answer(400, error_body(400, "BadRequestError", str(error)))

    async def _generate(self, exchange: Exchange) -> None:
        behaviour, counts = self.behaviour, self.counts
        body = msgspec.json.decode(await exchange.body(), type=GenerationBody)
        counts.requests += 1
        if behaviour.crash_on_request == counts.requests:
            self._crash(exchange)
        status = behaviour.fail_status if counts.requests <= behaviour.fail_first else behaviour.status
        if status >= 400:
            counts.refused += 1
            retry = behaviour.retry_after_s
            more = () if retry is None else ((b"retry-after", str(retry).encode()),)
            await exchange.answer(status, error_body(status, "MockError", f"told to answer {status}"), *more)
            return
        refusal = self._refusal(body)
        if refusal is not None:
            await exchange.answer(*refusal)
            return
        generation = self._plan(exchange, body)
        counts.running += 1
        watcher = asyncio.create_task(exchange.watch())
        try:
            await self._answer(exchange, body, generation)
        finally:
            counts.running -= 1
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher

    async def _answer(self, exchange: Exchange, body: GenerationBody, generation: Generation) -> None:
        """Writes an accepted request's answer."""
        await (self._stream if body.stream else self._whole)(exchange, generation)

    def _refusal(self, body: GenerationBody) -> tuple[int, bytes] | None:
        if body.model not in (None, self.behaviour.model):
            message = f"The model `{body.model}` does not exist."
            return 404, error_body(404, "NotFoundError", message, "model")
        longest = max(len(prompt) for prompt in body.prompts())
        if longest + (body.limit or 1) > self.behaviour.max_model_len:
            message = f"{longest} prompt tokens and {body.limit} to make exceed {self.behaviour.max_model_len}."
            return 400, error_body(400, "BadRequestError", message)
        return None

    def _plan(self, exchange: Exchange, body: GenerationBody) -> Generation:
        chat = exchange.scope["path"].startswith("/v1/chat")
        prompts = body.prompts()
        limit, stop_after = body.limit, self.behaviour.stop_after
        request_id = exchange.header(b"x-request-id") or os.urandom(16).hex()
        return Generation(
            kind="chat" if chat else "completion",
            response_id=f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            model=self.behaviour.model,
            created=int(time.time()),
            num_choices=len(prompts) * (body.n or 1),
            num_prompt_tokens=sum(map(len, prompts)),
            num_tokens=stop_after if limit is None else min(limit, stop_after),
            finish_reason="length" if limit is not None and limit <= stop_after else "stop",
            options=body.stream_options or StreamOptions(),
        )

    async def _stream(self, exchange: Exchange, generation: Generation) -> None:
        behaviour = self.behaviour
        await exchange.begin(200, b"text/event-stream; charset=utf-8")
        if behaviour.ttft_s:
            await asyncio.sleep(behaviour.ttft_s)
        pending = [generation.opening()]
        for index, events in enumerate(generation.steps()):
            if index and not index % behaviour.chunks_per_write:
                await exchange.write(b"".join(pending))
                pending.clear()
                await self._pause(behaviour.chunk_interval_s)
            if behaviour.crash_after_chunks == index:
                await exchange.write(b"".join(pending))
                self._crash(exchange)
            if exchange.gone.is_set():
                self.counts.aborted += 1
                return
            pending.append(events)
            self.counts.tokens += generation.num_choices
        if behaviour.crash_after_chunks == generation.num_tokens:
            await exchange.write(b"".join(pending))
            self._crash(exchange)
        await exchange.write(b"".join((*pending, generation.ending())), last=True)

    async def _whole(self, exchange: Exchange, generation: Generation) -> None:
        behaviour = self.behaviour
        seconds = behaviour.ttft_s + behaviour.chunk_interval_s * max(0, generation.num_tokens - 1)
        if seconds:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(exchange.gone.wait(), seconds)
        if exchange.gone.is_set():
            self.counts.aborted += 1
            return
        self.counts.tokens += generation.num_tokens * generation.num_choices
        await exchange.answer(200, generation.whole())

    async def _pause(self, interval_s: float) -> None:
        if not interval_s:
            await asyncio.sleep(0)
            return
        if self._clock.interval_s != interval_s:
            self._clock = StepClock(interval_s)
        await self._clock.wait()

    async def _render(self, exchange: Exchange) -> None:
        body = msgspec.json.decode(await exchange.body(), type=GenerationBody)
        self.counts.renders += 1
        if self.behaviour.render_s:
            await asyncio.sleep(self.behaviour.render_s)
        chat = exchange.scope["path"].startswith("/v1/chat")
        request_id = f"{'chatcmpl' if chat else 'cmpl'}-{os.urandom(16).hex()}"
        requests = rendered(body, request_id, self.behaviour.stop_after)
        await exchange.answer(200, msgspec.json.encode(requests[0] if chat else requests))

    async def _tokenize(self, exchange: Exchange) -> None:
        body = msgspec.json.decode(await exchange.body(), type=GenerationBody)
        tokens = body.prompts()[0]
        answer = {"count": len(tokens), "max_model_len": self.behaviour.max_model_len, "tokens": tokens}
        await exchange.answer(200, msgspec.json.encode(answer | {"token_strs": None}))

    async def _detokenize(self, exchange: Exchange) -> None:
        tokens = msgspec.json.decode(await exchange.body(), type=dict[str, Any]).get("tokens", [])
        ids = msgspec.convert(tokens, type=list[Annotated[int, Meta(ge=0, le=255)]])
        await exchange.answer(200, msgspec.json.encode({"prompt": bytes(ids).decode(errors="replace")}))

    async def _models(self, exchange: Exchange) -> None:
        name = self.behaviour.model
        card = {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": self.behaviour.owner,
            "root": name,
            "parent": None,
        }
        data = [card | {"max_model_len": self.behaviour.max_model_len, "permission": []}]
        await exchange.answer(200, msgspec.json.encode({"object": "list", "data": data}))

    async def _health(self, exchange: Exchange) -> None:
        await exchange.answer(200 if self.behaviour.healthy else 503, b"")

    async def _version(self, exchange: Exchange) -> None:
        await exchange.answer(200, msgspec.json.encode({"version": VERSION}))

    async def _metrics(self, exchange: Exchange) -> None:
        label = f'{{model_name="{self.behaviour.model}"}}'
        lines = (
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{label} {self.counts.running}",
            "# TYPE vllm:num_requests_waiting gauge",
            f"vllm:num_requests_waiting{label} 0",
            "# TYPE vllm:generation_tokens_total counter",
            f"vllm:generation_tokens_total{label} {self.counts.tokens}",
        )
        await exchange.begin(200, b"text/plain; version=0.0.4; charset=utf-8")
        await exchange.write("\n".join((*lines, "")).encode() if exchange.scope["method"] != "HEAD" else b"", last=True)

    async def _counts(self, exchange: Exchange) -> None:
        await exchange.answer(200, msgspec.json.encode(self.counts))

    async def _change(self, exchange: Exchange) -> None:
        change = msgspec.json.decode(await exchange.body(), type=dict[str, Any])
        self.behaviour = msgspec.convert(msgspec.to_builtins(self.behaviour) | change, type=Behaviour)
        await exchange.answer(200, msgspec.json.encode(self.behaviour))


async def serve_forever(app: AsgiApp, host: str, port: int) -> None:
    """Serves until cancelled; prints where, as one JSON line, once clients can connect."""
    async with serve_asgi(app, host, port) as served:
        click.echo(msgspec.json.encode({"url": served.url, "port": served.port, "pid": os.getpid()}))
        await asyncio.Event().wait()


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=0, show_default=True, help="0 lets the kernel choose.")
@click.option("--behaviour", default="{}", help='Behaviour as JSON, e.g. \'{"ttft_s": 0.05, "fail_first": 2}\'.')
def main(host: str, port: int, behaviour: str) -> None:
    """Serve a mock of vLLM's HTTP API; prints one JSON line with its URL."""
    try:
        wanted = msgspec.json.decode(behaviour.encode(), type=Behaviour)
    except msgspec.MsgspecError as error:
        raise click.BadParameter(str(error), param_hint="--behaviour") from error
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve_forever(MockVllm(wanted, crash_process), host, port))


if __name__ == "__main__":
    main()
