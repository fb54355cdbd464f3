"""A request inside an engine, and what one step plans for it. No torch here: the sim engine shares this file.

There is no prefill and no decode phase, only tokens catching up (vLLM v1's idea): a sequence has `num_tokens` known
tokens of which `num_computed` have their KV in the cache; a step computes up to `num_tokens - num_computed` more,
and when it reaches the end, samples one. Guesses at what follows (`drafts`) are more tokens to compute in that step;
those that the samples confirm become known, with their KV; `tokens` never holds one that is not confirmed.

    tokens   | prompt …………………………… | produced earlier | generated here |  drafts, in this step alone
             ^0            ^num_computed              ^num_prior       ^num_tokens
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from math import inf

from replicas.contract import GenerateRequest, TokenLogprob, cache_namespace, unpack_tokens
from replicas.engine.block_pool import NOWHERE, Reach
from replicas.engine.drafts import NO_DRAFTS, Drafts
from replicas.engine.order import OrderKey
from replicas.engine.structured.grammar import Grammar


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
    others': adapter and salt. `grammar`, for answers that must follow one, has taken in every output token.
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
    grammar: Grammar | None = None
    namespace: str = field(init=False)

    def __post_init__(self) -> None:
        self.namespace = cache_namespace(self.request.adapter, self.request.salt)

    @classmethod
    def from_request(cls, request: GenerateRequest, arrival: float, grammar: Grammar | None = None) -> Sequence:
        tokens = unpack_tokens(request.prompt + request.produced)
        return cls(request, tokens, request.num_prompt_tokens, len(tokens), arrival, grammar=grammar)

    def take(self, token_id: int) -> bool:
        """Takes in an output token; False for one that its grammar, which has failed, cannot tell right from wrong."""
        if self.grammar is not None and not self.grammar.advance(token_id):
            return False
        self.tokens.append(token_id)
        return True

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
    """Compute `num_tokens` tokens of `seq` from `start` on; when `samples`, draw the next one from the last logits.

    The last `len(drafts)` of them are guesses behind the one known token computed here, and a token is drawn at each
    of those too. They use cache slots (places in the block table) `[start, start + num_tokens)` like any others.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool
    drafts: Drafts = NO_DRAFTS

    @property
    def num_known(self) -> int:
        """Tokens to compute that are no guesses."""
        return self.num_tokens - len(self.drafts)

    @property
    def decodes(self) -> bool:
        """Whether the newest token is all there is to compute, but for guesses."""
        return self.samples and self.num_known == 1

    @property
    def token_ids(self) -> array[int]:
        """What to compute, guesses last."""
        token_ids = self.seq.tokens[self.start : self.start + self.num_known]
        token_ids.extend(self.drafts.token_ids)
        return token_ids

    @property
    def points(self) -> tuple[SamplePoint, ...]:
        """Where tokens are drawn for an item that samples: at each row of its drafts."""
        return tuple(SamplePoint(self.seq, self.drafts.path(row)) for row in range(len(self.drafts) + 1))


@dataclass(frozen=True, slots=True)
class SamplePoint:
    """Where a token is drawn: behind all of a sequence's tokens and the guesses `path`."""

    seq: Sequence
    path: tuple[int, ...] = ()

    @property
    def num_output(self) -> int:
        """The position among the output tokens of what is drawn."""
        return self.seq.num_output + len(self.path)

    def banned(self, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """What must not end the answer here: before `min_tokens`; and with `ignore_eos`, which else only hides the end,
        the end of what a grammar could go on with."""
        sampling = self.seq.request.sampling
        if self.num_output < sampling.min_tokens:
            return (*eos_token_ids, *sampling.stop_token_ids)
        return eos_token_ids if self.seq.grammar is not None and sampling.ignore_eos else ()

    @property
    def tokens(self) -> array[int]:
        """Everything before what is drawn. Not to be changed."""
        return self.seq.tokens + array("I", self.path) if self.path else self.seq.tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. `copies` are (source block, target block) to copy before anything is computed (copy-on-write)."""

    items: tuple[PlanItem, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)

    @property
    def num_decodes(self) -> int:
        """Sequences with one token to compute, and guesses behind it."""
        return sum(item.decodes for item in self.items)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of all others: those catching up."""
        return sum(item.num_tokens for item in self.items if not item.decodes)


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token drawn."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a runner returns. `sampled[i]` are the new tokens of the i-th plan item that samples: the drafts that were
    confirmed, and one more. Their KV (but the last one's) lies in the slots that follow the known tokens'.

    `prompt_logprobs[request_id]` are logprobs of the *next* token at each computed prompt position of this step that
    has one in the prompt (so positions start+1 … of the prompt). `draws[request_id]` are the tokens drawn at every row
    of an item's drafts, row 0 first.
    """

    sampled: tuple[tuple[Sampled, ...], ...]
    prompt_logprobs: dict[str, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    draws: dict[str, tuple[int, ...]] = field(default_factory=dict)
