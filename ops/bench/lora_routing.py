"""`warmgate bench lora-routing`: 50 adapters on two real replicas with 8 slots each, skewed load, by routing policy.

Every token is checked: each adapter's answers were drawn alone beforehand, and an answer that goes on as another
adapter's would is an error, not a figure.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

import httpx
from prometheus_client.parser import text_string_to_metric_families

from configs.schema import (
    ChannelConfig,
    Config,
    EngineConfig,
    GroupConfig,
    ModelConfig,
    RoutingConfig,
    TenantConfig,
)
from ops.bench.harness import BenchError, Notice, Plan, Ratio, Sample, Samples, alternate
from ops.bench.load_spec import Quantiles
from ops.bench.lora_files import write_random
from ops.bench.report import Report
from ops.bench.stack import Stack
from replicas.contract import AdapterSpec, GenerateRequest, SamplingParams, pack_tokens
from routing.adapters import Adapter, AdapterRegistry, Entry
from routing.store import Store

MODEL = "base"
ENGINES: tuple[Literal["native", "vllm"], ...] = ("native", "vllm")
POLICIES: tuple[Literal["warm", "least_outstanding"], ...] = ("warm", "least_outstanding")
SWAPS = "swaps a request"
LOADS = "warmgate_adapter_loads_total"
MAX_PARTED = 0.2
"""The share of answers that rounding may turn elsewhere."""

STRENGTH = 0.5
"""Standard deviation of the adapters' second matrices: enough that no two of them answer alike."""

_LOOKS = 300


@dataclass(frozen=True, slots=True)
class Workload:
    """`num_requests` a visit, `concurrency` at once; the adapter of each drawn with weight 1 / place ** `zipf`."""

    model_dir: Path
    num_adapters: int = 50
    num_prompts: int = 2
    num_requests: int = 120
    concurrency: int = 12
    num_prompt_tokens: int = 48
    max_tokens: int = 12
    zipf: float = 1.0
    strength: float = STRENGTH
    num_replicas: int = 2
    num_slots: int = 8
    rank: int = 8

    def name(self, index: int) -> str:
        return f"adapter-{index}"

    def prompts(self) -> list[list[int]]:
        """The same for every adapter: what tells answers apart is the adapter alone."""
        from replicas.engine.families import read_spec

        rng, size = Random("prompts"), read_spec(self.model_dir).vocab_size
        return [[rng.randrange(size) for _ in range(self.num_prompt_tokens)] for _ in range(self.num_prompts)]

    def engine(self, kind: Literal["native", "vllm"]) -> EngineConfig:
        return EngineConfig(
            kind=kind,
            dtype="float32",
            threads=1,
            block_size=32,
            self_check=False,
            kv_cache_gib=0.5,
            max_num_seqs=16,
            max_num_batched_tokens=512,
            max_adapters=self.num_slots,
            max_lora_rank=self.rank,
            lora_pool_gib=1.0,
        )

    def profile(self, kind: Literal["native", "vllm"], policy: Literal["warm", "least_outstanding"]) -> Config:
        return Config(
            cluster=f"bench{os.getpid()}",
            models=(ModelConfig(id=MODEL, source=str(self.model_dir)),),
            groups=(GroupConfig(name="g", model=MODEL, replicas=self.num_replicas, engine=self.engine(kind)),),
            tenants=(TenantConfig(id="bench", anonymous=True),),
            routing=RoutingConfig(policy=policy),
            channel=ChannelConfig(dead_after_s=20.0),
        )


BASE = -1
"""The base model's place among adapters: what it says is another's answer too."""

Answers = Mapping[tuple[int, int], Sequence[int]]
"""Adapter and prompt → the tokens that it says alone."""


@dataclass(slots=True)
class FleetSide:
    """Two replicas of one engine under one policy. A `harness.Side`."""

    name: str
    config: Config
    workload: Workload
    folder: Path
    prompts: Sequence[Sequence[int]]
    alone: Answers
    num_visits: int = 0
    num_parted: int = 0
    num_answers: int = 0
    _client: httpx.AsyncClient | None = None
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def start(self) -> None:
        stack = await self._stack.enter_async_context(Stack(self.config))
        self._client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{stack.port}", timeout=300, trust_env=False)
        self._stack.push_async_callback(self._client.aclose)
        await _register(stack, self._client, self.folder, self.workload)

    async def sample(self) -> Sample:
        work, rng = self.workload, Random(f"visit {self.num_visits}")
        self.num_visits += 1
        weights = [(i + 1) ** -work.zipf for i in range(work.num_adapters)]
        asked = [
            (i, rng.randrange(work.num_prompts))
            for i in rng.choices(range(work.num_adapters), weights, k=work.num_requests)
        ]
        gate, before, began = asyncio.Semaphore(work.concurrency), await self._loads(), time.perf_counter()
        firsts = await asyncio.gather(*(self._ask(adapter, prompt, gate) for adapter, prompt in asked))
        elapsed_s = time.perf_counter() - began
        ttft = Quantiles.of(firsts)
        assert ttft.p50 is not None and ttft.p99 is not None
        return {
            SWAPS: (await self._loads() - before) / work.num_requests,
            "TTFT p50 ms": 1000 * ttft.p50,
            "TTFT p99 ms": 1000 * ttft.p99,
            "requests/s": work.num_requests / elapsed_s,
        }

    async def stop(self) -> None:
        await self._stack.aclose()

    async def _loads(self) -> float:
        """Adapters that the replicas have loaded so far."""
        assert self._client is not None
        await asyncio.sleep(1.0)  # the ingress shows what replicas last told it
        text = (await self._client.get("/metrics")).text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == LOADS]
        return sum(s.value for s in samples if s.labels["outcome"] == "ok")

    async def _ask(self, adapter: int, prompt: int, gate: asyncio.Semaphore) -> float:
        """Seconds to the first token, from when the request had its turn. Raises BenchError for a wrong answer."""
        assert self._client is not None
        body = {
            "model": self.workload.name(adapter),
            "prompt": self.prompts[prompt],
            "max_tokens": self.workload.max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
        }
        async with gate:
            began, first, tokens = time.perf_counter(), 0.0, list[int]()
            async with self._client.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter() - began
                        event = json.loads(line.removeprefix("data: "))
                        tokens += [t for choice in event.get("choices", []) for t in choice.get("token_ids") or ()]
        if answer.status_code != 200 or len(tokens) != self.workload.max_tokens:
            raise BenchError(f"{self.name}: {body['model']} was answered {answer.status_code}, {len(tokens)} tokens")
        self._check(adapter, prompt, tokens)
        return first

    def _check(self, adapter: int, prompt: int, tokens: Sequence[int]) -> None:
        """Engines may part from what the adapter says alone where two tokens are nearly as likely; never towards
        another adapter's answer."""
        self.num_answers += 1
        own = _alike(tokens, self.alone[adapter, prompt])
        if own == len(tokens):
            return
        self.num_parted += 1
        if not own:
            raise BenchError(f"{self.name}: adapter {adapter} was answered as nobody would: {tokens}")
        for (other, asked), said in self.alone.items():
            if asked == prompt and other != adapter and _alike(tokens, said) > own:
                raise BenchError(f"{self.name}: adapter {adapter} was answered as {other} would: {tokens}")


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers have in common from the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


async def _register(stack: Stack, client: httpx.AsyncClient, folder: Path, workload: Workload) -> None:
    """Writes every adapter into the catalogue; returns when the ingress has them."""
    entries = [
        Entry(
            adapter=Adapter(
                name=workload.name(i), base_model=MODEL, path=str(folder / str(i)), rank=workload.rank
            ),
            at_us=i + 1,
        )
        for i in range(workload.num_adapters)
    ]  # fmt: skip
    store = Store(stack.redis_url, stack.config.cluster)
    try:
        await AdapterRegistry(store).write(entries)
    finally:
        await store.close()
    last = f"/v1/models/{workload.name(workload.num_adapters - 1)}"
    for _ in range(_LOOKS):
        if (await client.get(last)).status_code == 200:
            return
        await asyncio.sleep(0.1)
    raise BenchError(f"the ingress did not see {workload.num_adapters} adapters")


def answers_alone(workload: Workload, folder: Path) -> Answers:
    """What each adapter says with nobody beside it, by the in-house engine. Raises BenchError if two say the same."""
    from replicas.engine.engine import build_engine

    core = build_engine(workload.model_dir, workload.engine("native"), MODEL, time.monotonic).core
    prompts = workload.prompts()
    found: dict[tuple[int, int], Sequence[int]] = {}
    for adapter in (BASE, *range(workload.num_adapters)):
        spec = AdapterSpec(adapter_id=f"{adapter}@1", path=str(folder / str(adapter)), rank=workload.rank)
        if adapter != BASE:
            core.load_adapter(spec)
        for i, prompt in enumerate(prompts):
            sampling = SamplingParams(max_tokens=workload.max_tokens, seed=0, temperature=0.0, ignore_eos=True)
            request = GenerateRequest(
                request_id=f"{adapter}-{i}",
                prompt=pack_tokens(prompt),
                sampling=sampling,
                adapter=None if adapter == BASE else spec.adapter_id,
            )
            core.add(request)
            tokens: list[int] = []
            while core.has_work:
                for delta in core.step():
                    tokens += delta.token_ids
            found[adapter, i] = tokens
        if adapter != BASE:
            core.unload_adapter(spec.adapter_id)
    for i in range(len(prompts)):
        said = {tuple(found[adapter, i]) for adapter in range(BASE, workload.num_adapters)}
        if len(said) <= workload.num_adapters:
            raise BenchError(
                f"{workload.num_adapters} adapters have {len(said)} answers to prompt {i}: none is told apart"
            )
    return found


async def run(workload: Workload, engines: Sequence[Literal["native", "vllm"]], plan: Plan, notice: Notice) -> Report:
    """Measures; raises BenchError when a token is another adapter's."""
    samples, notes = Samples(), list[str]()
    with tempfile.TemporaryDirectory(prefix="wgb-lora-") as name:
        folder = Path(name)
        notice("what every adapter says alone")
        alone = await asyncio.to_thread(_prepared, workload, folder)
        for kind in engines:
            sides = [
                FleetSide(
                    f"{kind}, {policy}", workload.profile(kind, policy), workload, folder, workload.prompts(), alone
                )
                for policy in POLICIES
            ]
            found = await alternate(sides, plan, notice)
            samples.by_side.update(found.by_side)
            notes += [_said(side) for side in sides]
            for side in sides:
                if side.num_parted > MAX_PARTED * side.num_answers:
                    raise BenchError(f"{_said(side)}: too many to be rounding")
    facts = {
        "adapters": workload.num_adapters,
        "replicas": workload.num_replicas,
        "slots a replica": workload.num_slots,
        "Zipf": workload.zipf,
        "requests a visit": workload.num_requests,
        "at once": workload.concurrency,
        "tokens in, out": [workload.num_prompt_tokens, workload.max_tokens],
    }
    title = "Adapters on real engines: swaps and TTFT, by routing"
    return Report("lora-routing", title, samples, ratios(samples), facts, notes)


def _prepared(workload: Workload, folder: Path) -> Answers:
    from replicas.engine.families import read_spec

    for i in range(workload.num_adapters):
        write_random(folder / str(i), read_spec(workload.model_dir), workload.rank, seed=i, strength=workload.strength)
    return answers_alone(workload, folder)


def _said(side: FleetSide) -> str:
    return (
        f"{side.name}: {side.num_answers} answers checked token by token, none is another adapter's; "
        f"{side.num_parted} part from what their adapter says alone"
    )


def ratios(samples: Samples) -> list[Ratio]:
    """Our routing over least outstanding."""
    found = []
    for kind in ENGINES:
        ours, theirs = (f"{kind}, {policy}" for policy in POLICIES)
        if samples.comparable(ours, theirs):
            found += [
                samples.ratio(metric, ours, theirs) for metric in (SWAPS, "TTFT p50 ms", "TTFT p99 ms", "requests/s")
            ]
    return found
