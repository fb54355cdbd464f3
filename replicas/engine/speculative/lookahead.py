"""Lookahead decoding: the model guesses for itself, many positions at once, and n-grams that it came upon are checked.

Fu, Bailis, Stoica, Zhang: "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding" (2024). A window
holds what the last few rounds of Jacobi iteration said about the positions ahead; each step adds a round:

    position ahead   1    2    3    4    5    6         A column, top to bottom, and what the model draws below it is
    oldest round    a0   a1   a2   a3                   an n-gram that the model might say. A token sees its column
    next                 b0   b1   b2   b3              upwards, then the oldest round leftwards: the window is a tree
    drawn now                 c0   c1   c2   c3         (a0 ─ a1 ─ a2 ─ a3, b1 a child of a1, c1 drawn at b1 …).

N-grams that begin with the last known token are further branches of that tree. Nothing but the model is needed, and
it computes far more rows than it keeps: worth while where rows are nearly free, at small batches on a GPU.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

from replicas.engine.drafts import Drafts
from replicas.engine.sequence import Plan, Sequence, StepResult
from replicas.engine.speculative.drafter import Guess, Wish

_MAX_FIRST_TOKENS = 4096
"""First tokens whose n-grams are kept, per request, the latest used ones."""


@dataclass(frozen=True, slots=True)
class Lookahead:
    """`window` positions ahead, n-grams of `ngram` ≥ 2 tokens, `guesses` checked at once (the paper's W, N, G)."""

    window: int = 5
    ngram: int = 4
    guesses: int = 5

    @property
    def max_rows(self) -> int:
        """Rows a step may have for one sequence, besides its last token's."""
        return (self.window + self.guesses) * (self.ngram - 1)


@dataclass(slots=True)
class _Search:
    """One request's rounds, oldest first, each of `window` tokens; the n-grams found, by their first token; and the
    rows of the newest round in the tree that is being checked."""

    rounds: list[list[int]]
    found: OrderedDict[int, OrderedDict[tuple[int, ...], None]] = field(default_factory=OrderedDict)
    num_rows: int = 0
    newest: range = range(0)

    def keep(self, ngram: tuple[int, ...], num_kept: int) -> None:
        """Adds an n-gram: the latest of its first token come first."""
        ngrams = self.found.setdefault(ngram[0], OrderedDict())
        self.found.move_to_end(ngram[0])
        ngrams[ngram[1:]] = None
        ngrams.move_to_end(ngram[1:])
        if len(ngrams) > num_kept:
            ngrams.popitem(last=False)
        if len(self.found) > _MAX_FIRST_TOKENS:
            self.found.popitem(last=False)


class LookaheadDrafter:
    """Grows a window for every request it is asked for. `rng` fills it where nothing is known yet."""

    def __init__(self, shape: Lookahead, rng: random.Random) -> None:
        self._shape = shape
        self._rng = rng
        self._searches: dict[str, _Search] = {}

    def draft(self, wishes: Rows[Wish]) -> Mapping[str, Guess]:
        """See `Drafter.draft`. Trees have the shape's size, whatever is wished."""
        return {wish.seq.request_id: Guess(self._tree(wish.seq)) for wish in wishes}

    def observe(self, plan: Plan, result: StepResult) -> None:
        """Takes in a round, and moves the windows on by as many positions as there are new tokens."""
        sampling = [item for item in plan.items if item.samples]
        for item, sampled in zip(sampling, result.sampled, strict=True):
            search = self._searches.get(item.seq.request_id)
            if search is None or len(item.drafts) != search.num_rows:
                continue  # the tree was cut: the round is incomplete
            draws = result.draws[item.seq.request_id]
            drawn = [draws[row] for row in search.newest]
            for column in zip(*search.rounds, drawn, strict=True):
                search.keep(column, self._shape.guesses)
            search.rounds = [*search.rounds[1:], drawn]
            for past in search.rounds:
                # A round later its tokens stand one position further on; that is one new token's worth.
                del past[: len(sampled) - 1]
                past += self._fill(item.seq, self._shape.window - len(past))

    @property
    def is_settled(self) -> bool:
        """Always."""
        return True

    def retain(self, running: frozenset[str]) -> None:
        """See `Drafter.retain`."""
        if not self._searches.keys() <= running:
            self._searches = {name: search for name, search in self._searches.items() if name in running}

    def _tree(self, seq: Sequence) -> Drafts:
        search = self._searches.get(seq.request_id)
        if search is None:
            rounds = [self._fill(seq, self._shape.window) for _ in range(self._shape.ngram - 1)]
            search = self._searches[seq.request_id] = _Search(rounds)
        token_ids: list[int] = []
        parents: list[int] = []
        rows: dict[tuple[int, int], int] = {}
        for ngram in reversed(search.found.get(seq.tokens[-1], OrderedDict())):
            row = 0
            for token_id in ngram:
                key = (row, token_id)
                if key not in rows:
                    token_ids.append(token_id)
                    parents.append(row)
                    rows[key] = len(token_ids)
                row = rows[key]
        above = [0]
        for i, past in enumerate(search.rounds):
            first = len(token_ids) + 1
            token_ids += past
            # The oldest round is a chain; each later token hangs from the one above it.
            parents += [0, *range(first, first + len(past) - 1)] if i == 0 else above
            above = list(range(first, first + len(past)))
        search.num_rows, search.newest = len(token_ids), range(above[0], above[-1] + 1)
        return Drafts(tuple(token_ids), tuple(parents))

    def _fill(self, seq: Sequence, count: int) -> list[int]:
        """Tokens of the request at random, as good a start as any."""
        return [seq.tokens[self._rng.randrange(len(seq.tokens))] for _ in range(count)]
