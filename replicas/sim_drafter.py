"""A drafter that pretends: it knows what the sim model will say, and is right as often as it is told to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows

from replicas.engine.drafts import Drafts
from replicas.engine.sequence import Plan, Sequence, StepResult
from replicas.engine.speculative.drafter import Guess, Wish
from replicas.sim_model import MASK, SimModel, next_state, scramble

_DRAW = 0x2545F4914F6CDD1D


class SimDrafter:
    """`state_of(seq)` is the model's state after all of a sequence's tokens."""

    def __init__(self, model: SimModel, acceptance: float, state_of: Callable[[Sequence], int]) -> None:
        self._model = model
        self._limit = acceptance * MASK
        self._state_of = state_of

    @property
    def is_settled(self) -> bool:
        """Always."""
        return True

    def draft(self, wishes: Rows[Wish]) -> Mapping[str, Guess]:
        """See `Drafter.draft`."""
        return {wish.seq.request_id: Guess(self._chain(wish)) for wish in wishes}

    def _chain(self, wish: Wish) -> Drafts:
        seq, state, token_ids = wish.seq, self._state_of(wish.seq), list[int]()
        while len(token_ids) < wish.max_drafts:
            said = self._model.sample(state, seq.request.sampling, seq.num_output + len(token_ids)).token_id
            is_right = scramble(state ^ _DRAW) <= self._limit
            token_ids.append(said if is_right else (said + 1) % self._model.vocab_size)
            state = next_state(state, token_ids[-1])
        return Drafts.chain(token_ids)

    def observe(self, plan: Plan, result: StepResult) -> None:
        """Nothing to learn."""

    def retain(self, running: frozenset[str]) -> None:
        """Nothing to forget."""
