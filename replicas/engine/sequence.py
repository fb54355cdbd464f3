"""A request inside an engine, and what one step plans for it. No torch here: the sim engine shares this file.

There is no prefill and no decode phase, only tokens catching up (vLLM v1's idea): a sequence has `num_tokens` known
tokens of which `num_computed` have their KV in the cache; a step computes up to `num_tokens - num_computed` more,
and when it reaches the end, samples one.

    tokens   | prompt …………………………… | produced earlier | generated here |
             ^0            ^num_computed              ^num_prior       ^num_tokens
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from replicas.contract import GenerateRequest, TokenLogprob, unpack_tokens


@dataclass(slots=True, eq=False)
class Sequence:
    """One running or waiting request. `block_ids[i]` holds the KV of tokens `[i * block_size, (i + 1) * block_size)`.

    `num_prior` = prompt + tokens an earlier attempt produced. `num_cached` = prompt tokens found in the prefix cache
    when first scheduled. `arrival` is the engine's clock at submit, seconds. The block table may change anywhere
    between steps (an equal cached block replaces a duplicate), so a runner reads it anew each step.
    The last three fields are the scheduler's: place in the order, blocks already offered to the prefix cache, prompt
    logprobs collected over chunks.
    """

    request: GenerateRequest
    tokens: array[int]
    num_prompt: int
    num_prior: int
    arrival: float
    num_computed: int = 0
    num_cached: int | None = None
    block_ids: list[int] = field(default_factory=list)
    num_preemptions: int = 0
    order_key: tuple[float, float, int] = (0.0, 0.0, 0)
    num_registered: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @classmethod
    def from_request(cls, request: GenerateRequest, arrival: float) -> Sequence:
        tokens = unpack_tokens(request.prompt + request.produced)
        return cls(request, tokens, request.num_prompt_tokens, len(tokens), arrival)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        """Output tokens so far, those of earlier attempts included."""
        return len(self.tokens) - self.num_prompt

    @property
    def namespace(self) -> str:
        """What separates this sequence's prefix cache from others': adapter and salt."""
        return f"{self.request.adapter or ''}|{self.request.salt.hex()}"


@dataclass(frozen=True, slots=True)
class PlanItem:
    """Compute tokens `[start, start + num_tokens)` of `seq`; when `samples`, draw the next one from the last logits."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. `copies` are (source block, target block) to copy before anything is computed (copy-on-write)."""

    items: tuple[PlanItem, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token drawn for one plan item that samples, in the order of those items."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a runner returns. `prompt_logprobs[request_id]` are logprobs of the *next* token at each computed prompt
    position of this step that has one in the prompt (so positions start+1 … of the prompt)."""

    sampled: tuple[Sampled, ...]
    prompt_logprobs: dict[str, tuple[TokenLogprob, ...]] = field(default_factory=dict)
