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
from math import inf

from replicas.contract import GenerateRequest, TokenLogprob, cache_namespace, unpack_tokens
from replicas.engine.block_pool import NOWHERE, Reach
from replicas.engine.order import OrderKey


@dataclass(slots=True)
class Standing:
    """Where a sequence stands in the order (`replicas.engine.ranking`).

    `key` sorts; `due` is the time in it, `not_before` what other tenants have bounded that by. `num_expected`: tokens
    it would have to compute if it began now; `num_left` what it counts as pending (0: nothing). `reach`: what the
    prefix cache was last seen to hold of it.
    """

    number: int = 0
    key: OrderKey = (0.0, 0.0, 0)
    due: float = 0.0
    not_before: float = -inf
    num_expected: int = 0
    num_left: int = 0
    reach: Reach = NOWHERE


@dataclass(slots=True, eq=False)
class Sequence:
    """One running or waiting request. `block_ids[i]` holds the KV of tokens `[i * block_size, (i + 1) * block_size)`.

    `num_prior` = prompt + tokens an earlier attempt produced. `num_cached` = prompt tokens found in the prefix cache
    when first scheduled. `arrival` is the engine's clock at submit, seconds. The block table may change anywhere
    between steps (an equal cached block replaces a duplicate), so a runner reads it anew each step.
    `num_registered`, `prompt_logprobs` and `standing` are the scheduler's: blocks already offered to the prefix cache,
    prompt logprobs collected over chunks, and where it stands in the order. `namespace` separates its prefix cache from
    others': adapter and salt.
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
    num_registered: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    standing: Standing = field(default_factory=Standing)
    namespace: str = field(init=False)

    def __post_init__(self) -> None:
        self.namespace = cache_namespace(self.request.adapter, self.request.salt)

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
    def order_key(self) -> OrderKey:
        return self.standing.key

    @property
    def num_remaining(self) -> int:
        """Known tokens that are not computed."""
        return len(self.tokens) - self.num_computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Still to be computed and delivered: cached blocks must not stand in for computing the prompt."""
        wanted = self.request.sampling.prompt_logprobs is not None and not self.request.produced
        return wanted and len(self.tokens) == self.num_prior


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
