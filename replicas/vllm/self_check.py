"""The start-up self-check of a vLLM engine: does it compute the same on both of its paths?

A prompt's tokens are computed many at once, an answer's one by one, by different kernels. So an answer that was drawn
token by token is scored again as part of a prompt: every logprob must come out as before. What is wrong on one path
only (bfloat16 prefill of more than 32 tokens on some CPUs: fluent nonsense) shows as nats.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from replicas.contract import EngineError, EngineFacts, GenerateRequest, SamplingParams, TokenLogprob, pack_tokens

Run: TypeAlias = Callable[[GenerateRequest], Awaitable["Scored"]]
"""Runs one request to its end. Raises EngineError when it fails."""

PROMPT_TOKENS = 96
OUTPUT_TOKENS = 16
_TOLERANCE = {"float32": 0.02, "bfloat16": 0.4, "float16": 0.15}
"""Nats, in the mean over the answer."""


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer, and what each token was worth; of prompt tokens None for the first."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...]


async def self_check(run: Run, facts: EngineFacts) -> str:
    """What was found, in words. Raises EngineError when the engine must not serve."""
    num_prompt = min(PROMPT_TOKENS, facts.max_model_len - OUTPUT_TOKENS - 2)
    if num_prompt < 2:
        return f"skipped: a context of {facts.max_model_len} tokens has no room for it"
    prompt = _prompt(num_prompt, facts)
    answer = await run(_request("draw", prompt, OUTPUT_TOKENS, scored=False))
    again = await run(_request("score", [*prompt, *answer.token_ids], 1, scored=True))
    drawn = [logprob.logprob for logprob in answer.logprobs]
    scored = [logprob.logprob for logprob in again.prompt_logprobs[num_prompt:] if logprob is not None]
    if len(drawn) != OUTPUT_TOKENS or len(scored) != OUTPUT_TOKENS:
        raise EngineError(f"the self-check failed: {len(drawn)} tokens drawn, {len(scored)} scored of {OUTPUT_TOKENS}")
    error = sum(abs(one - other) for one, other in zip(drawn, scored, strict=True)) / OUTPUT_TOKENS
    tolerance = _TOLERANCE.get(facts.dtype, _TOLERANCE["bfloat16"])
    if facts.quantization or facts.kv_cache_dtype.startswith("fp8"):
        tolerance = max(tolerance, _TOLERANCE["bfloat16"])
    if not error <= tolerance:  # also when it is NaN
        raise EngineError(
            f"the self-check failed: in {facts.dtype} an answer drawn token by token is {error:.3g} nats a token from "
            f"what the same engine thinks of it as a prompt, {tolerance} are allowed; another engine.dtype may be "
            "right on this machine"
        )
    return f"passed: {OUTPUT_TOKENS} tokens after {num_prompt}, {error:.1e} nats between decoding and prefill"


def _prompt(num_tokens: int, facts: EngineFacts) -> list[int]:
    """Ids from all over the vocabulary, none of which ends an answer."""
    random, low = Random(0), min(facts.vocab_size // 4, 1000)
    found: list[int] = []
    while len(found) < num_tokens:
        token_id = random.randrange(low, max(low + 1, facts.vocab_size * 3 // 4))
        if token_id not in facts.eos_token_ids or facts.vocab_size < 8:
            found.append(token_id)
    return found


def _request(name: str, tokens: Sequence[int], max_tokens: int, *, scored: bool) -> GenerateRequest:
    sampling = SamplingParams(
        max_tokens=max_tokens,
        seed=0,
        temperature=0.0,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0 if scored else None,
    )
    salt = b"self-check"  # nobody's prefix
    return GenerateRequest(request_id=f"self-check-{name}", prompt=pack_tokens(tokens), sampling=sampling, salt=salt)
