"""The HTTP face over a sim engine that follows grammars, with templates of several families."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from configs.grammars.guard import GrammarGuard
from configs.schema import EngineConfig, ModelConfig, SimConfig
from configs.tokenizer import load_model_files
from gateway.app import build_app
from gateway.grammar_check import GrammarCheck
from gateway.types import Job
from replicas.contract import EngineFacts, GenerateRequest
from replicas.detokenize import TextEngine
from replicas.local import LocalEngine
from replicas.sim_engine import SimOptions, sim_engine
from tests.gateway.deltas import PumpedDeltas
from tests.gateway.scripted import Options, Served, serve

TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools> "
    '<tool_call>{"name": …}</tool_call><|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Hermes calls."""

THINKING_TEMPLATE = TOOLS_TEMPLATE + (
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
"""A model that thinks, unless told not to."""


class EngineDispatcher:
    """`gateway.types.Dispatcher` over one engine in this process."""

    def __init__(self, local: LocalEngine) -> None:
        self._local = local
        self.jobs: list[Job] = []

    def generate(self, job: Job) -> PumpedDeltas:
        self.jobs.append(job)
        request = GenerateRequest(
            request_id=job.request_id, prompt=job.prompt, sampling=job.sampling, salt=job.salt, priority=job.priority
        )
        return PumpedDeltas(self._local.stream(request))

    def facts(self, model_id: str) -> EngineFacts | None:
        return self._local.facts

    def num_ready(self, model_id: str) -> int:
        return 1


@asynccontextmanager
async def engine_gateway(template: str | None = None, **model: str) -> AsyncIterator[Served]:
    """A gateway over a sim engine; `model` are fields of its ModelConfig."""
    files = load_model_files("sim:bytes", Path())
    if template is not None:
        files = replace(files, chat_template=template)
    sim = SimConfig(step_base_s=0, step_per_sequence_s=0, prefill_tokens_per_s=1e9)
    options = SimOptions(tokenizer_json=files.tokenizer.to_str())
    engine = sim_engine(EngineConfig(kind="sim", sim=sim), files.vocab_size, files.special.eos, "sim", options)
    checks = GrammarCheck(GrammarGuard())
    named = ModelConfig(id="sim", source="sim:bytes", default_max_tokens=2000, **model)
    served = serve(options=Options(models=(named,), files=files))
    try:
        async with LocalEngine(TextEngine(engine, files.tokenizer)) as local:
            dispatcher = EngineDispatcher(local)
            gateway = replace(served.gateway, dispatcher=dispatcher, check_grammar=checks)
            yield replace(served, gateway=gateway, app=build_app(gateway), dispatcher=dispatcher)
    finally:
        checks.close()
