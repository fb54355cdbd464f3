"""Guesses at what comes next, which the model checks in one step beside everything else. No torch here.

    row 0: the last known token ─┬─ 1 ── 2 ── 3      a chain guesses one token for each of the next positions;
                                 └─ 4 ── 5           a tree guesses several

A row sees all known tokens and its ancestors. The model draws a token at every row as it would have done there
anyway, and a guess is right when it equals the draw at its parent. Since draws are a function of (seed, position,
context), what is delivered is what plain decoding would have delivered, whatever was guessed: greedy and sampled alike,
and so in distribution. (Drafter-invariant speculative decoding by shared Gumbel noise: Daliri, Musco and Suresh 2024.
Trees: SpecInfer, Miao et al. 2023.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Drafts:
    """Guessed tokens of one sequence: row i + 1 guesses `token_ids[i]` after row `parents[i]` ≤ i.

    Row 0 is the sequence's last known token. Row r lies in the KV cache r slots behind it, whatever its depth.
    """

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()

    @classmethod
    def chain(cls, token_ids: Sequence[int]) -> Drafts:
        return cls(tuple(token_ids), tuple(range(len(token_ids))))

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_chain(self) -> bool:
        return all(parent == row for row, parent in enumerate(self.parents))

    @property
    def first(self) -> tuple[int, ...]:
        """Everything guessed for the next position."""
        return tuple(token for token, parent in zip(self.token_ids, self.parents, strict=True) if parent == 0)

    @property
    def depths(self) -> tuple[int, ...]:
        """How many positions each row lies behind row 0, row 0 included."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    def path(self, row: int) -> tuple[int, ...]:
        """The guesses from row 0 (left out) to a row."""
        path: list[int] = []
        while row > 0:
            path.append(self.token_ids[row - 1])
            row = self.parents[row - 1]
        return tuple(reversed(path))

    def cut(self, max_drafts: int, max_depth: int) -> Drafts:
        """The first guesses, none deeper than `max_depth`."""
        if len(self) <= max_drafts and len(self) <= max_depth:
            return self
        if self.is_chain:
            return Drafts.chain(self.token_ids[: max(0, min(max_drafts, max_depth))])
        rows = {0: 0}
        token_ids: list[int] = []
        parents: list[int] = []
        for row, depth in enumerate(self.depths[1:], 1):
            if depth <= max_depth and len(token_ids) < max_drafts and self.parents[row - 1] in rows:
                token_ids.append(self.token_ids[row - 1])
                parents.append(rows[self.parents[row - 1]])
                rows[row] = len(token_ids)
        return Drafts(tuple(token_ids), tuple(parents))

    def accepted(self, draws: Sequence[int]) -> tuple[int, ...]:
        """The rows, one a depth, whose guesses the model's draws confirm. `draws[row]` is the token drawn at a row. Of
        equal siblings the first is followed."""
        children = {}
        for row in range(len(self), 0, -1):
            children[self.parents[row - 1], self.token_ids[row - 1]] = row
        rows: list[int] = []
        row = 0
        while (row := children.get((row, draws[row]), 0)) > 0:
            rows.append(row)
        return tuple(rows)


NO_DRAFTS = Drafts()
