"""The fields that chat and completions share, their bounds, and how they become `SamplingParams`.

Bounds are those of OpenAI's specification where it has the field, else vLLM's; a test holds them against the published
file. `stop`: at most 4 strings (OpenAI's bound; vLLM's is open). An explicit null is a field left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from gateway.api.structured import StructuredFields
from gateway.errors import BadRequestError, ContextLengthError, UnsupportedError
from replicas.contract import EngineFacts, SamplingParams

MAX_STOPS = 4
MAX_LOGPROBS = 20
_SEED_MODULUS = 2**63

Count: TypeAlias = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
StopString: TypeAlias = Annotated[str, Meta(min_length=1, max_length=1024)]
TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=2**32 - 1)]


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(StructuredFields, kw_only=True):
    """Fields of both generating routes."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128)] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def output_limit(self) -> int | None:
        """Most tokens the client asked for, None when it set no limit."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def check(self) -> None:
        """What one field demands of another. Raises BadRequestError."""
        if self.stream_options is not None and not self.stream:
            raise BadRequestError(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise BadRequestError("'prompt_logprobs' cannot be streamed.", param="prompt_logprobs")


@dataclass(frozen=True, slots=True)
class Logprobs:
    """How many alternatives a request wants at each output and each prompt position; None = no logprobs there."""

    output: int | None = None
    prompt: int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a request's tokens: the engines' facts, the profile's default, the field that holds the prompt."""

    facts: EngineFacts
    default_max_tokens: int
    prompt_param: str

    def max_tokens(self, fields: SamplingFields, num_prompt_tokens: int) -> int:
        """Output tokens allowed. Raises ContextLengthError, in OpenAI's words with the numbers."""
        context = self.facts.max_model_len
        limit = fields.output_limit
        if not num_prompt_tokens:
            raise BadRequestError(f"The {self.prompt_param} must have at least one token.", param=self.prompt_param)
        if num_prompt_tokens >= context:
            raise ContextLengthError(
                f"This model's maximum context length is {context} tokens. However, your {self.prompt_param} resulted "
                f"in {num_prompt_tokens} tokens. Please reduce the length of the {self.prompt_param}.",
                param=self.prompt_param,
            )
        if limit is None:
            return min(self.default_max_tokens, context - num_prompt_tokens)
        if num_prompt_tokens + limit > context:
            raise ContextLengthError(
                f"This model's maximum context length is {context} tokens. However, you requested "
                f"{num_prompt_tokens + limit} tokens ({num_prompt_tokens} in the {self.prompt_param}, {limit} in the "
                f"completion). Please reduce the length of the {self.prompt_param} or completion.",
                param=self.prompt_param,
            )
        return limit

    def check_logprobs(self, logprobs: Logprobs) -> None:
        """Whether the engines can give these. Raises BadRequestError."""
        wanted = logprobs.output if logprobs.output is not None else logprobs.prompt
        if wanted is not None and wanted > self.facts.max_logprobs:
            raise BadRequestError(
                f"This model gives at most {self.facts.max_logprobs} alternatives per token; you asked for {wanted}.",
                param="logprobs",
            )
        if logprobs.prompt is not None and not self.facts.prompt_logprobs:
            raise UnsupportedError("This model's engine gives no logprobs for the prompt (echo).", param="echo")

    def sampling(self, fields: SamplingFields, logprobs: Logprobs, num_prompt_tokens: int, seed: int) -> SamplingParams:
        """The engine's view of the fields. `seed` is this choice's. Raises BadRequestError."""
        max_tokens = self.max_tokens(fields, num_prompt_tokens)
        min_tokens = fields.min_tokens or 0
        if min_tokens > max_tokens:
            raise BadRequestError(
                f"'min_tokens' ({min_tokens}) must not be greater than the most tokens of the answer ({max_tokens}).",
                param="min_tokens",
            )
        stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
        return SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            min_tokens=min_tokens,
            temperature=_or(fields.temperature, 1.0),
            top_p=_or(fields.top_p, 1.0),
            top_k=fields.top_k if fields.top_k is not None and fields.top_k > 0 else None,
            min_p=_or(fields.min_p, 0.0),
            presence_penalty=_or(fields.presence_penalty, 0.0),
            frequency_penalty=_or(fields.frequency_penalty, 0.0),
            repetition_penalty=_or(fields.repetition_penalty, 1.0),
            logit_bias=_logit_bias(fields.logit_bias or {}, self.facts.vocab_size),
            stop=stop,
            stop_token_ids=tuple(fields.stop_token_ids or ()),
            include_stop_str_in_output=bool(fields.include_stop_str_in_output),
            skip_special_tokens=fields.skip_special_tokens is not False,
            ignore_eos=bool(fields.ignore_eos),
            logprobs=logprobs.output,
            prompt_logprobs=logprobs.prompt,
        )


def choice_seed(seed: int, index: int) -> int:
    """The seed of one choice: each its own, all from the request's; never negative (mapped modulo 2^63)."""
    return (seed + index) % _SEED_MODULUS


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    parsed: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
            raise BadRequestError(
                f"Invalid key in 'logit_bias': {key[:40]!r}. Keys are token ids from 0 to {vocab_size - 1}.",
                param="logit_bias",
            )
        parsed[int(key)] = value
    return parsed
