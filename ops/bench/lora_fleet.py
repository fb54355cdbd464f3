"""Two native replicas, a gateway and 1,000 registered adapters: requests of a Zipf mix over HTTP, each adapter loaded
when it is first asked for, beside the same requests to the base model."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx

from configs.schema import (
    AdmissionConfig,
    ChannelConfig,
    Config,
    EngineConfig,
    GroupConfig,
    ModelConfig,
    TenantConfig,
)
from ops.bench.harness import BenchError, Notice, Plan, Ratio, Sample, Samples, alternate
from ops.bench.lora_files import write_random
from ops.bench.stack import Stack
from routing.adapters import Adapter, AdapterRegistry, Entry
from routing.store import Store

MODEL = "base"
WITH, WITHOUT = "a Zipf mix of 1,000 adapters", "the same requests, base model"
SEEN_S = 30.0


@dataclass(frozen=True, slots=True)
class FleetWorkload:
    """`num_requests` a visit, `concurrency` at once, each an adapter drawn with weight 1 / place ** `zipf`."""

    num_adapters: int = 1000
    num_folders: int = 16
    num_requests: int = 120
    concurrency: int = 16
    num_prompt_tokens: int = 32
    max_tokens: int = 16
    zipf: float = 1.0
    num_replicas: int = 2
    num_slots: int = 32
    rank: int = 8


@dataclass(frozen=True, slots=True)
class Fleet:
    """What was measured."""

    samples: Samples
    facts: Mapping[str, Any]

    def ratios(self) -> Iterator[Ratio]:
        yield self.samples.ratio("tok/s over HTTP", WITH, WITHOUT)


def _profile(model_dir: Path, workload: FleetWorkload) -> Config:
    engine = EngineConfig(
        dtype="float32",
        self_check=False,
        kv_cache_gib=0.25,
        max_num_seqs=16,
        max_adapters=workload.num_slots,
        max_lora_rank=workload.rank,
        lora_pool_gib=8.0,
    )
    return Config(
        cluster="bench",
        models=(ModelConfig(id=MODEL, source=str(model_dir)),),
        groups=(GroupConfig(name="native", model=MODEL, replicas=workload.num_replicas, engine=engine),),
        tenants=(TenantConfig(id="bench", anonymous=True),),
        admission=AdmissionConfig(max_ahead_per_replica=8),
        channel=ChannelConfig(dead_after_s=10.0),
    )


@dataclass(slots=True)
class Requests:
    """One visit: every request of a round, its answer checked. A `harness.Side`."""

    name: str
    client: httpx.AsyncClient
    workload: FleetWorkload
    uses_adapters: bool
    vocab_size: int
    num_visits: int = 0

    async def start(self) -> None:
        """The fleet is there already."""

    async def sample(self) -> Sample:
        rng, asked = Random(self.num_visits), self.workload
        self.num_visits += 1
        weights = [(i + 1) ** -asked.zipf for i in range(asked.num_adapters)]
        chosen = rng.choices(range(asked.num_adapters), weights, k=asked.num_requests)
        gate = asyncio.Semaphore(asked.concurrency)
        began = time.perf_counter()
        firsts = await asyncio.gather(*(self._ask(rng.randbytes(8), i, gate) for i in chosen))
        elapsed_s = time.perf_counter() - began
        firsts.sort()
        return {
            "tok/s over HTTP": asked.num_requests * asked.max_tokens / elapsed_s,
            "TTFT p50, ms": 1000 * firsts[len(firsts) // 2],
            "TTFT p95, ms": 1000 * firsts[int(0.95 * len(firsts))],
        }

    async def stop(self) -> None:
        """It is stopped by who started it."""

    async def _ask(self, seed: bytes, adapter: int, gate: asyncio.Semaphore) -> float:
        """Seconds to the first token, from when the request had its turn."""
        rng, asked = Random(seed), self.workload
        body = {
            "model": _name(adapter) if self.uses_adapters else MODEL,
            "prompt": [rng.randrange(self.vocab_size) for _ in range(asked.num_prompt_tokens)],
            "max_tokens": asked.max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with gate:
            began, first, num_tokens = time.perf_counter(), 0.0, 0
            async with self.client.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    first = first or time.perf_counter() - began
                    if line.startswith("data: {"):
                        usage = json.loads(line.removeprefix("data: ")).get("usage")
                        num_tokens = usage["completion_tokens"] if usage else num_tokens
            if answer.status_code != 200 or num_tokens != asked.max_tokens:
                raise BenchError(f"{body['model']} was answered {answer.status_code} with {num_tokens} tokens")
        return first


def _name(index: int) -> str:
    return f"adapter-{index}"


async def measure(model_dir: Path, workload: FleetWorkload, plan: Plan, notice: Notice) -> Fleet:
    """Brings the fleet up, registers the adapters, takes turns."""
    from replicas.engine.families import read_spec

    notice("starting the fleet")
    with tempfile.TemporaryDirectory(prefix="wgb-lora-") as folder:
        await asyncio.to_thread(_write, Path(folder), model_dir, workload)
        async with Stack(_profile(model_dir, workload)) as stack:
            seen_s = await _register(stack, Path(folder), workload)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{stack.port}", timeout=120) as client:
                listed = len((await client.get("/v1/models")).json()["data"])
                size = read_spec(model_dir).vocab_size
                sides = [Requests(WITH, client, workload, True, size), Requests(WITHOUT, client, workload, False, size)]
                samples = await alternate(sides, plan, notice)
    facts = {"adapters registered": workload.num_adapters, "models listed": listed, "registered within, s": seen_s}
    slots = {"replicas": workload.num_replicas, "slots a replica": workload.num_slots, "Zipf": workload.zipf}
    return Fleet(samples, {**facts, **slots})


def _write(folder: Path, model_dir: Path, workload: FleetWorkload) -> None:
    from replicas.engine.families import read_spec

    for i in range(workload.num_folders):
        write_random(folder / str(i), read_spec(model_dir), workload.rank, seed=i)


async def _register(stack: Stack, folder: Path, workload: FleetWorkload) -> float:
    """Writes every adapter into the catalogue; returns the seconds until the ingress listed all of them."""
    began = time.perf_counter()
    entries = [
        Entry(
            adapter=Adapter(
                name=_name(i), base_model=MODEL, path=str(folder / str(i % workload.num_folders)), rank=workload.rank
            ),
            at_us=i + 1,
        )
        for i in range(workload.num_adapters)
    ]
    store = Store(stack.redis_url, stack.config.cluster)
    try:
        await AdapterRegistry(store).write(entries)
    finally:
        await store.close()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{stack.port}") as client:
        while time.perf_counter() - began < SEEN_S:
            if (await client.get(f"/v1/models/{_name(workload.num_adapters - 1)}")).status_code == 200:
                return round(time.perf_counter() - began, 3)
            await asyncio.sleep(0.02)
    raise BenchError(f"the ingress did not see {workload.num_adapters} adapters within {SEEN_S:g} s")
