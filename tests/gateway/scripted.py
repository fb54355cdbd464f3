"""A gateway whose replicas follow a script: everything of the HTTP face is real, only what would generate is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypeAlias

import httpx
from fastapi import FastAPI

from configs.schema import AdmissionConfig, Config, GroupConfig, HttpConfig, ModelConfig, TenantConfig
from configs.tokenizer import ModelFiles, load_model_files
from gateway.app import build_app
from gateway.ledger import Ledger, UsageRecord
from gateway.prompt import Prompter
from gateway.tenancy import Tenants
from gateway.types import Gateway, Job
from ops.metrics import Metrics
from replicas.contract import EngineFacts, StepDelta, TokenLogprob, unpack_tokens
from tests.gateway.deltas import PumpedDeltas

Step: TypeAlias = StepDelta | float | Exception | asyncio.Event
Script: TypeAlias = Callable[[Job], Iterable[Step]]

FACTS = EngineFacts(
    engine="scripted", model="sim", vocab_size=300, max_model_len=512, block_size=16, num_blocks=64, max_num_seqs=8,
    max_num_batched_tokens=512, prompt_logprobs=True,
)  # fmt: skip
WORDS = ("Hel", "lo", " wörld", "!")


def token_logprob(token_id: int, num_top: int) -> TokenLogprob:
    return TokenLogprob(token_id, -0.5, tuple((token_id + i, -0.5 - i) for i in range(num_top)))


def spoken(job: Job, words: Iterable[str] = WORDS, finish: str = "stop") -> list[Step]:
    """Deltas that say `words`, a byte token each character, with whatever logprobs the job asks for."""
    sampling, deltas = job.sampling, []
    prompt = unpack_tokens(job.prompt)
    num_prompt_top = sampling.prompt_logprobs
    for i, word in enumerate(words):
        ids = tuple(word.encode())
        delta = StepDelta(job.request_id, token_ids=ids, text=word)
        if sampling.logprobs is not None:
            delta.logprobs = tuple(token_logprob(t, sampling.logprobs) for t in ids)
        if i == 0:
            delta.num_cached_tokens = 16
            if num_prompt_top is not None:
                delta.prompt_logprobs = (None, *(token_logprob(t, num_prompt_top) for t in prompt[1:]))
        deltas.append(delta)
    return [*deltas, StepDelta(job.request_id, finish_reason=finish)]


class ScriptedDispatcher:
    """Plays a script per job; remembers the jobs, which of them were cancelled, and which ended."""

    def __init__(self, script: Script = spoken, facts: EngineFacts | None = FACTS) -> None:
        self.script = script
        self.engine_facts = facts
        self.jobs: list[Job] = []
        self.cancelled: list[str] = []
        self.ended: list[str] = []
        self.ready = 1

    def generate(self, job: Job) -> PumpedDeltas:
        return PumpedDeltas(self._play(job))

    async def _play(self, job: Job) -> AsyncGenerator[StepDelta, None]:
        self.jobs.append(job)
        try:
            for step in self.script(job):
                if isinstance(step, StepDelta):
                    yield step
                elif isinstance(step, Exception):
                    raise step
                elif isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    await asyncio.sleep(step)
            self.ended.append(job.request_id)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(job.request_id)
            raise

    def facts(self, model_id: str) -> EngineFacts | None:
        return self.engine_facts

    def num_ready(self, model_id: str) -> int:
        return self.ready


class RememberingLedger(Ledger):
    """A ledger whose records can be looked at."""

    def __init__(self, metrics: Metrics, path: Path | None = None) -> None:
        super().__init__(metrics, path)
        self.records: list[UsageRecord] = []

    def record(self, record: UsageRecord) -> None:
        self.records.append(record)
        super().record(record)


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


MODELS = (
    ModelConfig(id="sim", source="sim:bytes", aliases=("org/sim-model",), default_max_tokens=100),
    ModelConfig(id="other", source="sim:bytes"),
)


@dataclass
class Served:
    """A scripted gateway and its app."""

    dispatcher: ScriptedDispatcher
    gateway: Gateway
    app: FastAPI
    ledger: RememberingLedger
    clock: Clock

    def client(self, **headers: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers)


@dataclass
class Options:
    tenants: tuple[TenantConfig, ...] = (TenantConfig(id="local", anonymous=True),)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    models: tuple[ModelConfig, ...] = MODELS
    files: ModelFiles | None = None
    facts: EngineFacts | None = FACTS
    usage_log: Path | None = None


def serve(script: Script = spoken, options: Options | None = None) -> Served:
    """A gateway over a script; time stands still, randomness is seeded."""
    chosen = options or Options()
    config = Config(
        models=chosen.models,
        groups=tuple(GroupConfig(name=m.id, model=m.id) for m in chosen.models),
        tenants=chosen.tenants,
        admission=chosen.admission,
        http=chosen.http,
    )
    files = chosen.files or load_model_files("sim:bytes", Path())
    clock, metrics = Clock(), Metrics()
    dispatcher, ledger = ScriptedDispatcher(script, chosen.facts), RememberingLedger(metrics, chosen.usage_log)
    gateway = Gateway(
        config=config,
        dispatcher=dispatcher,
        prompters={model.id: Prompter(files) for model in chosen.models},
        tenants=Tenants(chosen.tenants, b"secret", clock),
        ledger=ledger,
        metrics=metrics,
        ingress_id="in1",
        clock=clock,
        wall=lambda: 1_800_000_000.0,
        random=Random(7),
        started_at=1_800_000_000.0,
    )
    return Served(dispatcher, gateway, build_app(gateway), ledger, clock)
