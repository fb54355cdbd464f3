"""Which candidates are measured: from the profile's values along one knob after the other, or every combination.

Along knobs (coordinate descent): each value of the first knob with the others as they are best so far, then the second
knob, …; again from the first as long as a round found something better. With k knobs of n values that is about
k·(n - 1) + 1 candidates a round instead of n^k; what it can miss is a pair of values that only help together.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import TypeAlias

from ops.tune.capacity import Capacity
from ops.tune.findings import Value, Values, key_of

TIE = 0.05
"""At the same rate a TTFT p99 must be so much shorter to count: two runs of the same candidate differ by as much."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A candidate and what came of it; `reason`: why it could not be measured."""

    values: Values
    capacity: Capacity | None = None
    reason: str = ""


def is_better(new: Outcome, old: Outcome | None) -> bool:
    """A higher rung; at the same rung a shorter TTFT p99; where neither meets any rate, the higher saturation."""
    if new.capacity is None:
        return False
    if old is None or old.capacity is None:
        return True
    ours, theirs = new.capacity, old.capacity
    if ours.rung is None or theirs.rung is None:
        if ours.rung is None and theirs.rung is None and not ours.is_bound:
            return ours.closed.requests_per_s > theirs.closed.requests_per_s * (1 + TIE)
        return theirs.rung is None
    return (ours.rung, -_ttft_p99(ours) * (1 + TIE)) > (theirs.rung, -_ttft_p99(theirs))


def _ttft_p99(capacity: Capacity) -> float:
    assert capacity.best is not None, "there is a rung"
    found = capacity.best.ttft.p99
    return float("inf") if found is None else found


Space: TypeAlias = Mapping[str, tuple[Value, ...]]
"""Values by knob, the profile's own first."""

Evaluate: TypeAlias = Callable[[Values, int | None], Awaitable[Outcome]]
"""Measures a candidate, or fails to; the rung is the one to beat."""


@dataclass(slots=True)
class Search:
    """One sweep. `outcomes` grows while it goes on, in the order tried; `best` is the best of them so far.

    `is_possible`: whether the profile's checks let a candidate pass; others are not tried.
    """

    space: Space
    is_possible: Callable[[Values], bool] = lambda _: True
    outcomes: list[Outcome] = field(default_factory=list)
    best: Outcome | None = None
    _seen: set[str] = field(default_factory=set)

    @property
    def base(self) -> Values:
        """The profile's own values."""
        return {name: values[0] for name, values in self.space.items()}

    async def along_knobs(self, evaluate: Evaluate) -> None:
        """Until a whole round finds nothing better."""
        await self._try(self.base, evaluate)
        better = True
        while better:
            before = self.best
            for name, values in self.space.items():
                for value in values:
                    around = self.base if self.best is None else self.best.values
                    await self._try({**around, name: value}, evaluate)
            better = self.best is not before

    async def everywhere(self, evaluate: Evaluate) -> None:
        """Every combination, the profile's own first."""
        for values in self._combinations():
            await self._try(values, evaluate)

    def num_expected(self, *, grid: bool) -> int:
        """Candidates of a round, or of the grid."""
        if grid:
            return sum(self.is_possible(values) for values in self._combinations())
        return 1 + sum(len(values) - 1 for values in self.space.values())

    def _combinations(self) -> Iterator[Values]:
        for values in product(*self.space.values()):
            yield dict(zip(self.space, values, strict=True))

    async def _try(self, values: Values, evaluate: Evaluate) -> None:
        if key_of(values) in self._seen or not self.is_possible(values):
            return
        self._seen.add(key_of(values))
        to_beat = None
        if self.best is not None and self.best.capacity is not None:
            to_beat = self.best.capacity.rung
        outcome = await evaluate(values, to_beat)
        self.outcomes.append(outcome)
        if is_better(outcome, self.best):
            self.best = outcome
