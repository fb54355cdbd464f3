"""A request of the contract as `POST /v1/completions`, and its stream as deltas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import tokenizers

from configs.grammars.flat import to_lark
from replicas.contract import (
    Fault,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    StepDelta,
    TokenLogprob,
    unpack_tokens,
)
from replicas.foreign.flavours import Flavour

_PLAIN = SamplingParams(max_tokens=1, seed=0)
_BEYOND = (
    "top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "skip_special_tokens",
    "include_stop_str_in_output",
)  # fmt: skip
_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class Usage(msgspec.Struct):
    completion_tokens: int = 0


class Logprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None


class Chunk(msgspec.Struct):
    """An event of a stream, as far as it is looked at."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: dict[str, Any] | None = None


def beyond(sampling: SamplingParams, flavour: Flavour) -> Iterator[Fault]:
    """What this server would pass over in silence."""
    for name in _BEYOND:
        if getattr(sampling, name) != getattr(_PLAIN, name) and name not in flavour.extras:
            yield _unsupported(name, f"the server behind this model ({flavour.name}) has no {name}")
    if sampling.logprobs is not None and not flavour.token_ids:
        yield _unsupported("logprobs", f"the server behind this model ({flavour.name}) gives no token ids with them")


def body_of(request: GenerateRequest, model: str, flavour: Flavour) -> bytes:
    """The request's body. Raises GrammarError for a constraint that is not well-formed."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": unpack_tokens(request.prompt).tolist(),
        "stream": True,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed & 0x7FFF_FFFF,
    }
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, name):
            body[name] = getattr(sampling, name)
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.logit_bias:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    for name, there in flavour.extras.items():
        if getattr(sampling, name) != getattr(_PLAIN, name):
            body[there] = getattr(sampling, name)
    if flavour.token_ids:
        body["return_token_ids"] = True
        if request.salt:
            body["cache_salt"] = request.salt.hex()
        if sampling.logprobs is not None:
            body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if sampling.constraint is not None:
        body["structured_outputs"] = {"grammar": to_lark(sampling.constraint.source)}
    return json.dumps(body).encode()


class StreamReader:
    """One answer's events → deltas. Where the server gives no token ids, those of the text as our tokenizer has it."""

    def __init__(self, request: GenerateRequest, tokenizer: tokenizers.Tokenizer) -> None:
        self.has_ended = False
        self.has_begun = False
        self._request = request
        self._tokenizer = tokenizer

    def delta(self, data: bytes) -> StepDelta | None:
        """Of one `data:` line; None when it says nothing of interest. Raises msgspec.MsgspecError."""
        if data == b"[DONE]":
            return None
        chunk = msgspec.json.decode(data, type=Chunk)
        if chunk.error is not None:
            self.has_ended = True
            message = str(chunk.error.get("message", "the server ended the stream with an error"))
            return self.failure(Fault("internal", message[:500], retryable=True))
        if not chunk.choices or self.has_ended:
            return None
        choice = chunk.choices[0]
        if not choice.text and not choice.token_ids and choice.finish_reason is None:
            return None
        delta = StepDelta(self._request.request_id, self._request.attempt, self._ids(choice), choice.text)
        if not self.has_begun:
            self.has_begun = True
            delta.num_cached_tokens = 0  # it does not say before its end, if at all
        if choice.logprobs is not None and self._request.sampling.logprobs is not None:
            delta.logprobs = _logprobs(choice.logprobs, self._request.sampling.logprobs)
        if choice.finish_reason is not None:
            self.has_ended = True
            delta.finish_reason = _FINISH.get(choice.finish_reason, "stop")
            delta.stop_reason = choice.stop_reason
        return delta

    def failure(self, fault: Fault) -> StepDelta:
        return StepDelta(self._request.request_id, self._request.attempt, finish_reason="error", fault=fault)

    def _ids(self, choice: Choice) -> tuple[int, ...]:
        if choice.token_ids is not None:
            return tuple(choice.token_ids)
        return tuple(self._tokenizer.encode(choice.text, add_special_tokens=False).ids) if choice.text else ()


def status_fault(status: int, text: str) -> Fault:
    """What an answer that is none means for the request."""
    message = _message(text) or f"the server answered {status}"
    if status in (400, 422):
        return Fault("unsupported_parameter", message)
    if status == 429:
        return Fault("overloaded", message, retryable=True)
    if status == 503:  # it starts, stops, or has nobody to serve it: another server may
        return Fault("draining", message, retryable=True)
    return Fault("internal", f"the server answered {status}: {message}"[:500], retryable=True)


def _message(text: str) -> str:
    try:
        found = json.loads(text)
        error = found.get("error", found)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    except (ValueError, AttributeError):
        return text.strip()[:200]


def _logprobs(found: Logprobs, num_top: int) -> tuple[TokenLogprob, ...]:
    tops = found.top_logprobs or [None] * len(found.tokens)
    rows = zip(found.tokens, found.token_logprobs, tops, strict=False)
    return tuple(TokenLogprob(_id(token), logprob or 0.0, _top(top, num_top)) for token, logprob, top in rows)


def _top(found: dict[str, float] | None, num_top: int) -> tuple[tuple[int, float], ...]:
    if not found or not num_top:
        return ()
    ranked = sorted(((_id(token), logprob) for token, logprob in found.items()), key=lambda pair: -pair[1])
    return tuple(ranked[:num_top])


def _id(token: str) -> int:
    """vLLM writes `token_id:123`."""
    return int(token.rpartition(":")[2])


def _unsupported(param: str, message: str) -> Fault:
    return Fault("unsupported_parameter", message, param=param)
