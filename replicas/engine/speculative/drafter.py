"""What guesses: the seam between the methods of speculation and the one that decides how much of it is worth while."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Protocol

from replicas.engine.drafts import Drafts
from replicas.engine.sequence import Plan, Sequence, StepResult


@dataclass(frozen=True, slots=True)
class Wish:
    """Up to `max_drafts` ≥ 1 guesses at what follows `seq.tokens` are wanted."""

    seq: Sequence
    max_drafts: int


@dataclass(frozen=True, slots=True)
class Guess:
    """What a drafter offers. `trust` tells apart guesses that come true more or less often (longer matches, say):
    acceptance is learnt for each."""

    drafts: Drafts
    trust: int = 0


class Drafter(Protocol):
    """One method of guessing. Called on the engine's thread, in every step. What it says changes how fast tokens come,
    never which."""

    @property
    def is_settled(self) -> bool:
        """Whether the last call did its usual work alone, so that the step's time tells what guessing costs."""
        ...

    def draft(self, wishes: Rows[Wish]) -> Mapping[str, Guess]:
        """Guesses by request id, for those who get any. Not every running request is asked for in every step."""
        ...

    def observe(self, plan: Plan, result: StepResult) -> None:
        """What the model made of the step, committed already."""
        ...

    def retain(self, running: frozenset[str]) -> None:
        """Only these requests run: whatever is held for others can go."""
        ...
