"""An engine without its thread: requests in, everything they produced out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.schema import EngineConfig
from replicas.contract import GenerateRequest, SamplingParams, StepDelta, TokenLogprob, pack_tokens
from replicas.engine.core import EngineCore
from replicas.engine.engine import build_engine
from replicas.engine.loop import BuiltEngine


@dataclass
class Answer:
    """All that one request produced."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    num_cached: int | None = None
    finish_reason: str | None = None

    def take(self, delta: StepDelta) -> None:
        assert self.finish_reason is None, "a delta after the terminal one"
        self.tokens += delta.token_ids
        self.logprobs += delta.logprobs or ()
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.num_cached_tokens is not None:
            self.num_cached = delta.num_cached_tokens
        self.finish_reason = delta.finish_reason


def make_request(request_id: str, prompt: Sequence[int], **changes: Any) -> GenerateRequest:
    """Greedy, without an end token, unless `changes` (of either struct) say otherwise."""
    sampling: dict[str, Any] = {"max_tokens": 8, "seed": 5, "temperature": 0.0, "ignore_eos": True}
    sampling.update({name: changes.pop(name) for name in list(changes) if name in SamplingParams.__struct_fields__})
    packed = pack_tokens(prompt)
    return GenerateRequest(request_id=request_id, prompt=packed, sampling=SamplingParams(**sampling), **changes)


def run(core: EngineCore, requests: Iterable[GenerateRequest]) -> dict[str, Answer]:
    """Adds all requests at once and steps until every one has ended."""
    answers = {}
    for request in requests:
        core.add(request)
        answers[request.request_id] = Answer()
    while core.has_work:
        for delta in core.step():
            answers[delta.request_id].take(delta)
        assert core.dead is None, core.dead
        core.scheduler.check()
    return answers


def build(folder: Path, **changes: Any) -> BuiltEngine:
    """An engine of the profile's defaults and `changes`, without the self-check."""
    return build_engine(folder, EngineConfig(**{"self_check": False, **changes}), "tested", time.monotonic)
