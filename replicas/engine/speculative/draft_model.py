"""A smaller model that guesses: it runs ahead of the large one, with KV blocks of its own.

It draws as the large model does, with the same noise at the same position, so that where the two distributions agree
the two draws do: the chance of agreement is at least (1 - d) / (1 + d) for a total variation distance d (Daliri, Musco
and Suresh 2024); at temperature 0 the likeliest tokens are compared. Knows runners and blocks only, no torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import msgspec

from replicas.contract import GenerateRequest
from replicas.engine.block_pool import BlockPool
from replicas.engine.core import Runner
from replicas.engine.drafts import Drafts
from replicas.engine.sequence import Plan, PlanItem, Sequence, StepResult
from replicas.engine.speculative.drafter import Guess, Wish

_FEW_TOKENS = 16
"""So many are computed in passing, before the first guess."""


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """`max_len`: the small model's context. `max_num_batched_tokens`: tokens it computes at most to catch up with what
    was said, in one step."""

    max_len: int
    max_num_batched_tokens: int


@dataclass(slots=True)
class _Shadow:
    """A sequence as the small model has it, with its guesses behind the `num_said` tokens that are no guesses."""

    seq: Sequence
    num_said: int = 0

    def follow(self, said: array[int]) -> None:
        """Forgets what was guessed wrong, and takes in what was said instead."""
        tokens, agreed = self.seq.tokens, self.num_said
        while agreed < min(len(tokens), len(said)) and tokens[agreed] == said[agreed]:
            agreed += 1
        del tokens[agreed:]
        tokens.extend(said[agreed:])
        self.num_said = len(said)
        # The last token is computed again, if need be: what follows it is to be drawn.
        self.seq.num_computed = min(self.seq.num_computed, agreed, len(said) - 1)

    @property
    def num_guessed(self) -> int:
        return self.seq.num_tokens - self.num_said

    @property
    def rest(self) -> PlanItem:
        """What is left to compute, to draw the token that follows."""
        return PlanItem(self.seq, self.seq.num_computed, self.seq.num_remaining, samples=True)


class DraftModelDrafter:
    """`runner` and `pool` are the small model's alone."""

    def __init__(self, runner: Runner, pool: BlockPool, limits: DraftLimits) -> None:
        self._runner = runner
        self._pool = pool
        self._limits = limits
        self._shadows: dict[str, _Shadow] = {}
        self._is_settled = True

    @property
    def is_settled(self) -> bool:
        """See `Drafter.is_settled`: whether nobody had more to catch up with than a few tokens."""
        return self._is_settled

    def draft(self, wishes: Rows[Wish]) -> Mapping[str, Guess]:
        """See `Drafter.draft`. Who has much to catch up with gets no guess yet."""
        ready = self._catch_up([(self._shadow(wish.seq), wish) for wish in wishes])
        going = ready
        while going:
            sampled = self._runner.execute(Plan(tuple(shadow.rest for shadow, _ in going))).sampled
            for (shadow, _), (token,) in zip(going, sampled, strict=True):
                shadow.seq.num_computed = shadow.seq.num_tokens
                shadow.seq.tokens.append(token.token_id)
            going = [(shadow, wish) for shadow, wish in going if shadow.num_guessed < wish.max_drafts]
        return {
            wish.seq.request_id: Guess(Drafts.chain(shadow.seq.tokens[shadow.num_said :])) for shadow, wish in ready
        }

    def observe(self, plan: Plan, result: StepResult) -> None:
        """Nothing to learn: what was said is compared at the next call."""

    def retain(self, running: frozenset[str]) -> None:
        """See `Drafter.retain`."""
        for name in self._shadows.keys() - running:
            self._pool.free(self._shadows.pop(name).seq.block_ids)

    def _shadow(self, seq: Sequence) -> _Shadow:
        shadow = self._shadows.get(seq.request_id)
        if shadow is None:
            shadow = self._shadows[seq.request_id] = _Shadow(Sequence.from_request(_plain(seq.request), seq.arrival))
        shadow.follow(seq.tokens)
        return shadow

    def _catch_up(self, asked: list[tuple[_Shadow, Wish]]) -> list[tuple[_Shadow, Wish]]:
        """Computes what the small model lacks, within the budget, but for the last few tokens; who can guess now."""
        budget = self._limits.max_num_batched_tokens
        chunks: list[PlanItem] = []
        ready: list[tuple[_Shadow, Wish]] = []
        for shadow, wish in asked:
            seq = shadow.seq
            if seq.num_tokens + wish.max_drafts > self._limits.max_len or not self._has_blocks(seq, wish.max_drafts):
                continue
            if seq.num_remaining <= min(budget, _FEW_TOKENS):
                budget -= seq.num_remaining
                ready.append((shadow, wish))
            elif budget > 0:
                num_tokens = min(seq.num_remaining - 1, budget)
                chunks.append(PlanItem(seq, seq.num_computed, num_tokens, samples=False))
                budget -= num_tokens
        if chunks:
            self._runner.execute(Plan(tuple(chunks)))
            for item in chunks:
                item.seq.num_computed += item.num_tokens
        self._is_settled = not chunks
        return ready

    def _has_blocks(self, seq: Sequence, num_drafts: int) -> bool:
        """Takes the blocks that a sequence and its guesses need, if there are so many."""
        missing = -(-(seq.num_tokens + num_drafts) // self._pool.block_size) - len(seq.block_ids)
        if missing > self._pool.num_free:
            return False
        seq.block_ids.extend(self._pool.allocate(max(0, missing)))
        return True


def _plain(request: GenerateRequest) -> GenerateRequest:
    """The request as far as it tells which token to draw: no adapter, no scores, no constraint."""
    sampling = msgspec.structs.replace(request.sampling, logprobs=None, prompt_logprobs=None, constraint=None)
    return msgspec.structs.replace(request, sampling=sampling, adapter=None)
