"""The front-ends that `bench routing` replays a slice through, each with sim replicas of its own."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import msgspec

from configs.schema import (
    AdmissionConfig,
    Config,
    EngineConfig,
    GroupConfig,
    ModelConfig,
    RoutingConfig,
    SimConfig,
    TenantConfig,
)
from ops.bench.gateway import answers, free_port
from ops.bench.harness import BenchError
from ops.bench.replay import (
    BLOCK_SIZE,
    MAX_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    PREFILL_TOKENS_PER_S,
    STEP_BASE_S,
    STEP_PER_SEQUENCE_S,
    Outcome,
    ReplayRequest,
    SliceSpec,
    block_tokens,
    replay,
    slice_of,
)
from ops.bench.replay_http import HttpAsker
from ops.bench.rivals.ray_replay import Job
from ops.bench.rivals.venvs import RivalVenv
from ops.bench.stack import MODEL, Stack
from ops.simulate.formats import load_trace
from ops.simulate.trace import Trace

RAY_READY_S = 120.0

VLLM_POLICIES: dict[str, tuple[str, ...]] = {
    "cache_aware": ("--policy", "cache_aware"),
    "cache_aware_sglang": (
        *("--policy", "cache_aware", "--cache-threshold", "0.5", "--balance-abs-threshold", "32"),
        *("--balance-rel-threshold", "1.0001", "--eviction-interval-secs", "60", "--max-tree-size", str(2**24)),
    ),
    "round_robin": ("--policy", "round_robin"),
    "power_of_two": ("--policy", "power_of_two"),
}
"""vllm-router's options by the name of the policy that restates each."""

ALWAYS_FREE = 1_000_000
"""Requests that may wait at a replica where nothing is held back at the ingress."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A slice, ready to send."""

    trace: Trace
    spec: SliceSpec
    requests: list[ReplayRequest]

    @classmethod
    def read(cls, path: Path, spec: SliceSpec) -> Workload:
        """Raises TraceError."""
        trace = load_trace(path)
        return cls(trace, spec, slice_of(trace, spec))

    @property
    def engine(self) -> EngineConfig:
        """Every side's replica, but for the order of its prompts: first come, first served, as other servers do it."""
        sim = SimConfig(
            prefill_tokens_per_s=PREFILL_TOKENS_PER_S,
            step_base_s=STEP_BASE_S,
            step_per_sequence_s=STEP_PER_SEQUENCE_S,
            num_blocks=self.spec.num_blocks,
            max_model_len=self.spec.num_blocks * BLOCK_SIZE,
        )
        return EngineConfig(
            kind="sim",
            block_size=BLOCK_SIZE,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
            max_waiting=ALWAYS_FREE,
            order="fcfs",
            sim=sim,
        )

    def profile(self, policy: str | None) -> Config:
        """Our gateway with this policy and nothing held back, or (None) as it ships."""
        engine = self.engine
        if policy is None:
            engine = msgspec.structs.replace(engine, order=EngineConfig().order)
        model = ModelConfig(id=MODEL, source="sim:bytes", route_block_tokens=max(BLOCK_SIZE, self.block_tokens))
        plain = Config(
            cluster="bench",
            models=(model,),
            groups=(GroupConfig(name="sim", model=MODEL, replicas=self.spec.num_replicas, engine=engine),),
            tenants=(TenantConfig(id="bench", anonymous=True),),
        )
        if policy is None:
            return plain
        routing = msgspec.convert({"policy": policy}, type=RoutingConfig)
        admission = AdmissionConfig(max_ahead_per_replica=ALWAYS_FREE)
        return msgspec.structs.replace(plain, routing=routing, admission=admission)

    @property
    def block_tokens(self) -> int:
        return block_tokens(self.trace, self.spec)


Play: TypeAlias = Callable[[Sequence[ReplayRequest]], Awaitable[list[Outcome]]]
"""Sends requests through a front-end that runs, each at its time."""


@contextlib.asynccontextmanager
async def over_http(port: int) -> AsyncIterator[Play]:
    """Plays against a server."""

    async def play(requests: Sequence[ReplayRequest]) -> list[Outcome]:
        asker = HttpAsker(port, MODEL, len(requests))
        try:
            return await replay(requests, asker.ask)
        finally:
            asker.close()

    yield play


@contextlib.asynccontextmanager
async def warmgate(workload: Workload, policy: str | None) -> AsyncIterator[Play]:
    async with Stack(workload.profile(policy)) as stack, over_http(stack.port) as play:
        yield play


@contextlib.asynccontextmanager
async def vllm_router(workload: Workload, options: Sequence[str]) -> AsyncIterator[Play]:
    """vllm-router and a mock server a replica, all of them processes."""
    program = str(RivalVenv.named("vllm-router").require().program("vllm-router"))
    engine = msgspec.json.encode(workload.engine).decode()
    async with AsyncExitStack() as processes:
        urls = []
        for index in range(workload.spec.num_replicas):
            words = ("--model", MODEL, "--worker-id", f"mock-{index}", "--engine", engine)
            mock = await processes.enter_async_context(
                child(sys.executable, "-m", "ops.bench.mock_engine", *words, stdout=asyncio.subprocess.PIPE)
            )
            urls.append(msgspec.json.decode(await line_of(mock, RAY_READY_S))["url"])
        port = free_port()
        words = ("--worker-urls", *urls, "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning")
        more = ("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()))
        check = ("--worker-startup-check-interval", "1")
        quiet = asyncio.subprocess.DEVNULL
        await processes.enter_async_context(child(program, *words, *more, *check, *options, stdout=quiet, stderr=quiet))
        await answers(f"http://127.0.0.1:{port}/health")
        async with over_http(port) as play:
            yield play


@contextlib.asynccontextmanager
async def ray_serve(workload: Workload, router: str) -> AsyncIterator[Play]:
    """A Ray of its own, with a deployment of sim engines behind one of Ray's routers."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "ops.bench.rivals.ray_replay")
    with tempfile.TemporaryFile() as log:
        try:
            async with child(*command, stdin=pipe, stdout=pipe, stderr=log.fileno()) as process:
                assert process.stdin is not None
                job = Job(router, workload.spec.num_replicas, workload.engine, workload.requests)
                process.stdin.write(msgspec.json.encode(job) + b"\n")
                await line_of(process, RAY_READY_S)
                yield lambda _: _ray_outcomes(process)
                process.stdin.close()
                await process.wait()
        except BenchError as error:
            log.seek(0)
            raise BenchError(f"{error}: {log.read().decode(errors='replace').strip()[-800:]}") from error


async def _ray_outcomes(process: asyncio.subprocess.Process) -> list[Outcome]:
    """Says go; the process replays the requests that it was given at its start."""
    assert process.stdin is not None
    process.stdin.write(b"go\n")
    return msgspec.json.decode(await line_of(process, math.inf), type=list[Outcome])


@contextlib.asynccontextmanager
async def child(*command: str, **streams: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that ends with the block; it is asked first."""
    process = await asyncio.create_subprocess_exec(*command, limit=2**26, **streams)  # type: ignore[arg-type]
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 20)
        if process.returncode is None:
            process.kill()
            await process.wait()


async def line_of(process: asyncio.subprocess.Process, limit_s: float) -> bytes:
    """The next line a process says. Raises BenchError when it ends, or says nothing for that long."""
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), None if math.isinf(limit_s) else limit_s)
    except TimeoutError as error:
        raise BenchError(f"a process said nothing for {limit_s:g} s") from error
    if not line:
        raise BenchError(f"a process ended with status {await process.wait()}")
    return line


def opening_of(name: str) -> Callable[[Workload], AbstractAsyncContextManager[Play]]:
    """How the side of that name starts."""
    front, _, rule = name.partition(":")
    if front == "vllm-router":
        return lambda workload: vllm_router(workload, VLLM_POLICIES[rule])
    if front == "ray":
        return lambda workload: ray_serve(workload, rule)
    return lambda workload: warmgate(workload, rule or None)
