"""A lean load generator for streamed answers, in a process of its own so that its CPU is nobody's.

benchmark                      python -m ops.bench.load
   spec (one JSON line)  ──►   builds bodies, then says `ready`
   `go`                  ──►   sends, collects raw bytes with arrival times, says `done`
                         ◄──   only now checks every answer; the result (one JSON line)
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

import httptools
import msgspec
import uvloop

from ops.bench.harness import BenchError
from ops.bench.load_spec import AnswerError, Closed, LoadResult, LoadSpec, Quantiles, Timing, read_answer


@dataclass(slots=True)
class Call:
    """One request's fate: when it was meant to leave, and what came back when."""

    intended_s: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    status: int = 0
    fault: str | None = None


class Connection(asyncio.Protocol):
    """One keep-alive connection that carries one request at a time (the callbacks are httptools')."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._call: Call | None = None
        self._done: asyncio.Future[None] | None = None
        self._now = 0.0

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own class does not derive from it

    async def send(self, call: Call, request: bytes) -> None:
        """Returns when the answer is complete. Raises ConnectionError when the connection is cut before."""
        assert self._transport is not None
        self._call, self._done = call, asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(ConnectionError(f"not HTTP: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end(ConnectionError("the connection was cut before the answer's end"))

    def on_headers_complete(self) -> None:
        if self._call is not None:
            self._call.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._call is not None:
            self._call.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        keep = self._parser.should_keep_alive()
        self._parser = httptools.HttpResponseParser(self)
        self._end(None)
        if not keep:
            self.close()

    def _end(self, error: Exception | None) -> None:
        done, self._done, self._call = self._done, None, None
        if done is not None and not done.done():
            done.set_result(None) if error is None else done.set_exception(error)


class Generator:
    """Sends a spec's requests and judges the answers."""

    def __init__(self, spec: LoadSpec) -> None:
        self._spec = spec
        self._idle: list[Connection] = []
        lines = [f"POST {spec.route} HTTP/1.1", f"host: {spec.host}:{spec.port}", "content-type: application/json"]
        lines += [f"{name}: {value}" for name, value in spec.headers.items()]
        head = "\r\n".join(lines)
        self._requests = [f"{head}\r\ncontent-length: {len(b)}\r\n\r\n".encode() + b for b in spec.bodies()]
        self.calls: list[Call] = []
        self.wall_s = 0.0

    async def run(self) -> None:
        start = time.perf_counter()
        arrivals = self._spec.arrivals
        if isinstance(arrivals, Closed):
            waiting = iter(self._requests)
            await asyncio.gather(*(self._worker(waiting) for _ in range(arrivals.concurrency)))
        else:
            times = arrivals.times(len(self._requests), random.Random(self._spec.seed))
            async with asyncio.TaskGroup() as group:
                for at, request in zip(times, self._requests, strict=True):
                    await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
                    group.create_task(self._call(start + at, request))
        self.wall_s = time.perf_counter() - start
        for connection in self._idle:
            connection.close()

    async def _worker(self, waiting: Iterator[bytes]) -> None:
        for request in waiting:
            await self._call(time.perf_counter(), request)

    async def _call(self, intended_s: float, request: bytes) -> None:
        call = Call(intended_s)
        self.calls.append(call)
        try:
            connection = await self._connection()
        except OSError as error:
            call.fault = f"cannot connect: {error}"
            return
        try:
            await asyncio.wait_for(connection.send(call, request), self._spec.timeout_s)
            self._idle.append(connection)
        except TimeoutError:
            call.fault = f"no end within {self._spec.timeout_s} s"
            connection.close()
        except ConnectionError as error:
            call.fault = str(error)

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(Connection, self._spec.host, self._spec.port)
        return made


def judge(spec: LoadSpec, calls: Sequence[Call], wall_s: float) -> LoadResult:
    """Reads every answer to its end and sums up; a request without a right answer counts as one that never ends."""
    ttfts, latencies, gaps, faults = [], [], [], []
    timings: list[Timing | None] = []
    num_ok = num_rejected = num_events = num_tokens = num_prompt = num_cached = 0
    for call in calls:
        body = b"".join(piece for _, piece in call.pieces)
        try:
            if call.fault is not None or call.status != 200:
                raise AnswerError(call.fault or f"status {call.status}: {body[:200]!r}")
            answer = read_answer(body, spec.num_tokens)
        except (AnswerError, msgspec.MsgspecError) as error:
            num_rejected += call.status in (429, 503)
            faults.append(str(error))
            ttfts.append(math.inf)
            latencies.append(math.inf)
            timings.append(None)
            continue
        num_ok += 1
        num_events += answer.num_events
        num_tokens += answer.num_tokens
        num_prompt += answer.num_prompt
        num_cached += answer.num_cached
        ttfts.append(arrival_of(call.pieces, answer.first_end) - call.intended_s)
        latencies.append(call.pieces[-1][0] - call.intended_s)
        timings.append(Timing(ttfts[-1], (latencies[-1] - ttfts[-1]) / max(1, answer.num_tokens - 1)))
        times = [at for at, _ in call.pieces]
        gaps += [later - earlier for earlier, later in pairwise(times)]
    return LoadResult(
        num_requests=len(calls),
        num_ok=num_ok,
        num_rejected=num_rejected,
        num_failed=len(faults) - num_rejected,
        num_events=num_events,
        num_tokens=num_tokens,
        wall_s=wall_s,
        ttft=Quantiles.of(ttfts),
        latency=Quantiles.of(latencies),
        gap=Quantiles.of(gaps),
        faults=tuple(faults[:5]),
        num_prompt_tokens=num_prompt,
        num_cached_tokens=num_cached,
        timings=tuple(timings),
    )


def arrival_of(pieces: Sequence[tuple[float, bytes]], offset: int) -> float:
    """When the byte before `offset` came."""
    seen = 0
    for at, piece in pieces:
        seen += len(piece)
        if seen >= offset:
            return at
    raise AnswerError(f"the body has {seen} bytes, fewer than {offset}")


def main() -> None:
    """The process's side of the conversation above."""
    if hasattr(os, "SCHED_BATCH"):  # else each piece it receives may throw the measured process off its core
        with contextlib.suppress(PermissionError):  # a container may forbid it: then the figures are noisier
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    spec = msgspec.json.decode(sys.stdin.buffer.readline(), type=LoadSpec)
    generator = Generator(spec)
    _say(b"ready")
    sys.stdin.buffer.readline()
    uvloop.run(generator.run())
    _say(b"done")
    _say(msgspec.json.encode(judge(spec, generator.calls, generator.wall_s)))


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


class LoadProcess:
    """The benchmark's side of the conversation above."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ready(self) -> None:
        """Returns when the requests are built and `go` can be said."""
        await self._hear(b"ready")

    async def go(self) -> None:
        """Starts sending and returns when the last answer has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        await self._hear(b"done")

    async def result(self) -> LoadResult:
        """What came of it, checked. Raises BenchError when an answer was wrong."""
        result = msgspec.json.decode(await self._line(), type=LoadResult)
        if result.num_failed:
            raise BenchError(f"{result.num_failed} of {result.num_requests} answers were wrong: {result.faults}")
        return result

    async def _hear(self, word: bytes) -> None:
        line = await self._line()
        if line.strip() != word:
            raise BenchError(f"the load generator said {line[:200]!r} instead of {word!r}")

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise BenchError(f"the load generator ended with status {await self._process.wait()}")
        return line


@contextlib.asynccontextmanager
async def load_process(spec: LoadSpec) -> AsyncIterator[LoadProcess]:
    """A generator in its own process, its requests built, waiting for `go`."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "ops.bench.load")
    # Not in our process group: a Ctrl-C is for us, who end it.
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=2**24, process_group=0)
    try:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(spec) + b"\n")
        load = LoadProcess(process)
        await load.ready()
        yield load
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


if __name__ == "__main__":
    main()
