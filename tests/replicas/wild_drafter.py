"""A drafter for tests that knows what the sim model will say, and says that, other things, or both, in trees."""

from __future__ import annotations

import random
from collections.abc import Mapping
from collections.abc import Sequence as Rows

from replicas.engine.drafts import Drafts
from replicas.engine.sequence import Plan, Sequence, StepResult
from replicas.engine.speculative.drafter import Guess, Wish
from replicas.sim_model import SimModel, next_state, root_state


def said_next(model: SimModel, seq: Sequence, path: tuple[int, ...] = ()) -> int:
    """What the model will say after the sequence and some guesses: recomputed from the first token."""
    state = root_state(seq.request.adapter)
    for token_id in (*seq.tokens, *path):
        state = next_state(state, token_id)
    return model.sample(state, seq.request.sampling, seq.num_output + len(path)).token_id


class WildDrafter:
    """Trees of any shape; each row is right with probability `share_right` (if its parent is, it will be accepted)."""

    def __init__(self, model: SimModel, seed: int, share_right: float) -> None:
        self.num_asked = 0
        self._model = model
        self._rng = random.Random(seed)
        self._share_right = share_right

    def draft(self, wishes: Rows[Wish]) -> Mapping[str, Guess]:
        self.num_asked += len(wishes)
        return {wish.seq.request_id: Guess(self._tree(wish)) for wish in wishes if self._rng.random() < 0.9}

    def _tree(self, wish: Wish) -> Drafts:
        rng, tree = self._rng, Drafts()
        chains_only = rng.random() < 0.3
        for row in range(rng.randint(1, wish.max_drafts)):
            parent = row if chains_only else rng.randint(max(0, row - 3), row)
            right = said_next(self._model, wish.seq, tree.path(parent))
            token_id = right if rng.random() < self._share_right else rng.randrange(self._model.vocab_size)
            tree = Drafts((*tree.token_ids, token_id), (*tree.parents, parent))
        return tree

    def observe(self, plan: Plan, result: StepResult) -> None:
        sampling = [item for item in plan.items if item.samples]
        for item, sampled in zip(sampling, result.sampled, strict=True):
            assert len(result.draws[item.seq.request_id]) == len(item.drafts) + 1
            assert sampled[0].token_id == result.draws[item.seq.request_id][0]

    @property
    def is_settled(self) -> bool:
        return True

    def retain(self, running: frozenset[str]) -> None: ...
