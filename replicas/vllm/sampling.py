"""A request of the contract → vLLM's, and what must not be sent to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm.sampling_params import SamplingParams as VllmParams
from vllm.sampling_params import StructuredOutputsParams

from configs.grammars.flat import to_lark
from configs.grammars.source import GrammarError
from replicas.contract import EngineFacts, Fault, GenerateRequest, SamplingParams, unpack_tokens
from replicas.engine.limits import refusal, unknown_token

MAX_LOGIT_BIAS = 1024
MAX_STOP_IDS = 128
"""vLLM's GPU sampler has tables of these sizes, and raises in the worker, which ends the engine, beyond them."""

MAX_TEMPERATURE = 2.0


@dataclass(frozen=True, slots=True)
class Rules:
    """What one engine takes. `seeded_resume`: noise depends on a token's position, not on what was drawn before."""

    facts: EngineFacts
    seeded_resume: bool

    def refusal(self, request: GenerateRequest) -> Fault | None:
        """Why it can never run here; None when it can."""
        # Which answers can be continued is decided below, not for all at once.
        return (
            refusal(request, msgspec.structs.replace(self.facts, exact_resume=True))
            or next(self._beyond(request), None)
            or unknown_token(request, self.facts.vocab_size)
        )

    def _beyond(self, request: GenerateRequest) -> Iterator[Fault]:
        sampling = request.sampling
        if request.produced and not self.resumes(sampling):
            reason = "this engine continues an answer begun elsewhere only where nothing depends on how it was begun"
            yield _unsupported("produced", reason)
        if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
            yield _unsupported("logit_bias", f"logit_bias has {len(sampling.logit_bias)} entries, {MAX_LOGIT_BIAS} fit")
        if len(sampling.stop_token_ids) > MAX_STOP_IDS:
            num_ids = len(sampling.stop_token_ids)
            yield _unsupported("stop_token_ids", f"stop_token_ids has {num_ids} entries, {MAX_STOP_IDS} fit")
        if sampling.temperature > MAX_TEMPERATURE:
            reason = f"temperature is {sampling.temperature}, the most is {MAX_TEMPERATURE}"
            yield _unsupported("temperature", reason)

    def resumes(self, sampling: SamplingParams) -> bool:
        """Whether a continued answer is the one that was begun."""
        return (
            (sampling.temperature == 0.0 or self.seeded_resume)
            and sampling.presence_penalty == 0.0
            and sampling.frequency_penalty == 0.0
            and sampling.constraint is None
        )


def params_of(request: GenerateRequest, facts: EngineFacts) -> VllmParams:
    """vLLM's parameters. Raises GrammarError when the constraint is not even well-formed."""
    sampling, num_produced = request.sampling, len(request.produced) // 4
    num_before = request.num_prompt_tokens + num_produced
    max_tokens = min(sampling.max_tokens - num_produced, facts.max_model_len - num_before)
    return VllmParams(
        max_tokens=max_tokens,
        min_tokens=min(max(0, sampling.min_tokens - num_produced), max_tokens),
        seed=sampling.seed & 0x7FFF_FFFF_FFFF_FFFF,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or 0,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        structured_outputs=_structured(sampling),
        detokenize=False,
        skip_clone=True,
    )


def prompt_of(request: GenerateRequest) -> dict[str, Any]:
    """Token ids as vLLM's renderer would hand them over. The salt separates prefix caches."""
    token_ids = unpack_tokens(request.prompt + request.produced).tolist()
    prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": token_ids}
    if request.salt:
        prompt["cache_salt"] = request.salt.hex()
    return prompt


def bad_grammar(error: GrammarError, param: str) -> Fault:
    """The fault of a constraint that cannot be used."""
    code = "grammar_too_complex" if error.too_complex else "invalid_grammar"
    return Fault(code, error.message, param=param)


def _structured(sampling: SamplingParams) -> StructuredOutputsParams | None:
    if sampling.constraint is None:
        return None
    return StructuredOutputsParams(grammar=to_lark(sampling.constraint.source))


def _unsupported(param: str, message: str) -> Fault:
    return Fault("unsupported_parameter", message, param=param)
