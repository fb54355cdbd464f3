"""The front-ends that `bench routing` replays a slice through, each with sim replicas of its own."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

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
from ops.bench.children import child, line_of
from ops.bench.gateway import answers, free_port
from ops.bench.replay import Outcome, Play, replay
from ops.bench.replay_http import HttpAsker
from ops.bench.replay_ray import RayReplays
from ops.bench.rivals.ray_replay import Author, Job
from ops.bench.rivals.venvs import RivalVenv
from ops.bench.stack import MODEL, Stack
from ops.bench.trace_slice import (
    BLOCK_SIZE,
    MAX_NUM_SEQS,
    PREFILL_TOKENS_PER_S,
    STEP_BASE_S,
    STEP_PER_SEQUENCE_S,
    ReplayRequest,
    SliceSpec,
    block_tokens,
    scaled,
    slice_of,
)
from ops.simulate.formats import load_trace
from ops.simulate.trace import Trace

READY_S = 60.0

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

RAY_FRONTS: dict[str, Author] = {"ray": "ray", "warmgate-in-ray": "warmgate"}
"""Whose request router a deployment of sim engines gets: Ray's own, or ours with the policy that restates it."""

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
            max_num_batched_tokens=self.spec.max_num_batched_tokens,
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
        admission = AdmissionConfig(max_ahead_per_replica=ALWAYS_FREE, look_ahead=0)
        return msgspec.structs.replace(plain, routing=routing, admission=admission)

    def job(self, rule: str, author: Author) -> Job:
        """A visit of a deployment in Ray, its request router by this author."""
        return Job(rule, self.spec.num_replicas, self.engine, self.requests, self.block_tokens, author)

    @property
    def block_tokens(self) -> int:
        return block_tokens(self.trace, self.spec)

    @property
    def scaled(self) -> Trace:
        """What the requests are made from, in their seconds and tokens."""
        return scaled(self.trace, self.spec)


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
            urls.append(msgspec.json.decode(await line_of(mock, READY_S))["url"])
        port = free_port()
        words = ("--worker-urls", *urls, "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning")
        more = ("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()))
        check = ("--worker-startup-check-interval", "1")
        quiet = asyncio.subprocess.DEVNULL
        await processes.enter_async_context(child(program, *words, *more, *check, *options, stdout=quiet, stderr=quiet))
        await answers(f"http://127.0.0.1:{port}/health")
        async with over_http(port) as play:
            yield play


def opening_of(name: str, rays: RayReplays) -> Callable[[Workload], AbstractAsyncContextManager[Play]]:
    """How the side of that name starts; sides inside Ray in the Ray of `rays`."""
    front, _, rule = name.partition(":")
    if front == "vllm-router":
        return lambda workload: vllm_router(workload, VLLM_POLICIES[rule])
    if front in RAY_FRONTS:
        return lambda workload: rays.deployed(workload.job(rule, RAY_FRONTS[front]))
    return lambda workload: warmgate(workload, rule or None)
