"""An engine's limits, and what it refuses because of them: decided before acceptance, on any thread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from configs.schema import EngineConfig
from replicas.contract import EngineFacts, Fault, GenerateRequest, SamplingParams, unpack_tokens
from replicas.engine.order import OrderName


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one engine. `max_model_len` is the model's; what the pool holds bounds it further
    (`Scheduler.max_len`)."""

    max_model_len: int
    eos_token_ids: frozenset[int] = frozenset()
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_waiting: int = 1024
    order: OrderName = "shortest"
    prefix_caching: bool = True
    max_adapters: int = 0
    max_prefill_stall_s: float | None = None

    @classmethod
    def from_engine(cls, config: EngineConfig, max_model_len: int, eos_token_ids: Iterable[int]) -> SchedulerConfig:
        """The profile's limits, with what the model's files say."""
        return cls(
            max_model_len=max_model_len,
            eos_token_ids=frozenset(eos_token_ids),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_waiting=config.max_waiting,
            order=config.order,
            prefix_caching=config.prefix_caching,
            max_adapters=config.max_adapters,
            max_prefill_stall_s=config.max_prefill_stall_s,
        )


def refusal(request: GenerateRequest, facts: EngineFacts) -> Fault | None:
    """Why this engine can never run the request; None when it can. O(1) but for the smallest fields."""
    return next(_refusals(request, facts), None)


def unknown_token(request: GenerateRequest, vocab_size: int) -> Fault | None:
    """A prompt id outside the vocabulary would be an index error in the middle of a step. O(tokens)."""
    largest = max(unpack_tokens(request.prompt + request.produced))
    if largest < vocab_size:
        return None
    return Fault(
        "unsupported_parameter", f"token id {largest} is not in the vocabulary of {vocab_size}", param="prompt"
    )


def context_length(num_tokens: int, max_model_len: int) -> Fault:
    """The fault of a prompt that can never fit."""
    return Fault(
        "context_length_exceeded",
        f"This model's maximum context length is {max_model_len} tokens, but the prompt has {num_tokens} tokens, "
        "which leaves no room for an answer.",
        param="prompt",
    )


def _refusals(request: GenerateRequest, facts: EngineFacts) -> Iterator[Fault]:
    num_bytes = len(request.prompt)
    if num_bytes == 0 or num_bytes % 4 or len(request.produced) % 4:
        yield Fault("unsupported_parameter", f"the prompt is not packed token ids: {num_bytes=}", param="prompt")
        return
    # A resumed request may be exactly full: it then ends with `length` at once.
    if request.num_prompt_tokens >= facts.max_model_len:
        yield context_length(request.num_prompt_tokens, facts.max_model_len)
    num_tokens = (num_bytes + len(request.produced)) // 4
    if num_tokens > facts.max_model_len:
        yield context_length(num_tokens, facts.max_model_len)
    if request.produced and not facts.exact_resume:
        yield _unsupported("produced", "this engine cannot continue an answer begun elsewhere")
    if request.adapter is not None and facts.max_adapters == 0:
        yield Fault("adapter_not_found", f"this engine has no adapters: {request.adapter}", param="model")
    yield from _sampling_refusals(request.sampling, facts)


def _sampling_refusals(sampling: SamplingParams, facts: EngineFacts) -> Iterator[Fault]:
    for name, asked in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        if asked is not None and asked > facts.max_logprobs:
            yield _unsupported(name, f"{name} is {asked}, the most is {facts.max_logprobs}")
    if sampling.prompt_logprobs is not None and not facts.prompt_logprobs:
        yield _unsupported("prompt_logprobs", "this engine gives no logprobs of prompt tokens")
    if sampling.constraint is not None and not facts.structured:
        yield _unsupported(sampling.constraint.param, "this engine cannot make its answers follow a grammar")
    for name, ids in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        for token_id in ids:
            if not 0 <= token_id < facts.vocab_size:
                yield _unsupported(name, f"{name}: token id {token_id} is not in the vocabulary of {facts.vocab_size}")


def _unsupported(param: str, message: str) -> Fault:
    return Fault("unsupported_parameter", message, param=param)
