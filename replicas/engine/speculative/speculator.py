"""Speculation in an engine: guesses before a step, bookkeeping after it.

draft(decoding) ─► drafter ─► guesses ─► as many as pay ─► the plan ┄┄ observe(plan, result) ─► acceptance, costs
                                  └────► those not checked are compared with what was said anyway

A drafter that fails costs the speed that it gave, nothing else: it is not asked again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

from replicas.engine.drafts import Drafts
from replicas.engine.sequence import Plan, Sequence, StepResult
from replicas.engine.speculative.control import Control
from replicas.engine.speculative.drafter import Drafter, Guess, Wish

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Counts since the start: chains or trees checked, guessed tokens in them, and those that came true: in all, and by
    position behind the last known token."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_by_position: tuple[int, ...] = ()


@dataclass(slots=True)
class _Counts:
    num_drafts: int = 0
    num_draft_tokens: int = 0
    by_position: list[int] = field(default_factory=list)

    def add(self, num_guessed: int, num_accepted: int) -> None:
        self.num_drafts += 1
        self.num_draft_tokens += num_guessed
        self.by_position += [0] * (num_accepted - len(self.by_position))
        for i in range(num_accepted):
            self.by_position[i] += 1


class Speculator:
    """One engine's speculation: what `drafter` guesses, as far as `control` finds it worth while."""

    def __init__(self, drafter: Drafter, control: Control) -> None:
        self.drafter = drafter
        self.control = control
        self._counts = _Counts()
        self._guesses: Mapping[str, Guess] = {}
        self._has_failed = False

    @property
    def stats(self) -> SpeculationStats:
        """What was guessed so far, and how well."""
        counts = self._counts
        accepted = tuple(counts.by_position)
        return SpeculationStats(counts.num_drafts, counts.num_draft_tokens, sum(accepted), accepted)

    def draft(self, decoding: Rows[Sequence]) -> Mapping[str, Drafts]:
        """Guesses for the next step, by request id. `decoding`: the sequences that will draw a token in it."""
        if self._has_failed:
            return {}
        by_name = {seq.request_id: seq for seq in decoding}
        names = list(by_name)
        asked = self.control.ask(names) if names else {}
        wishes = [Wish(by_name[name], count) for name, count in asked.items() if _bears_guesses(by_name[name])]
        try:
            self.drafter.retain(frozenset(by_name))
            self._guesses = self.drafter.draft(wishes)
        except Exception:
            self._fail()
        picked = self.control.pick(names, self._guesses) if names else {}
        return {name: self._guesses[name].drafts.cut(count, count) for name, count in picked.items() if count}

    def observe(self, plan: Plan, result: StepResult, elapsed_s: float) -> None:
        """Learns from an executed plan that took `elapsed_s` seconds, drafting included."""
        if self._has_failed:
            return
        sampling = [item for item in plan.items if item.samples]
        for item, sampled in zip(sampling, result.sampled, strict=True):
            guess = self._guesses.get(item.seq.request_id)
            if guess is not None and guess.drafts:
                self._compare(item.seq.request_id, guess, item.drafts, [token.token_id for token in sampled])
        if self.drafter.is_settled and all(item.decodes for item in plan.items):
            self.control.observe_step(len(sampling), sum(len(item.drafts) for item in sampling), elapsed_s)
        try:
            self.drafter.observe(plan, result)
        except Exception:
            self._fail()

    def _fail(self) -> None:
        """Goes on without guesses. Call while the drafter's exception is handled."""
        logger.exception("the drafter failed: the engine goes on without guesses")
        self._has_failed = True
        self._guesses = {}

    def _compare(self, name: str, guess: Guess, checked: Drafts, said: list[int]) -> None:
        """Counts a guess: checked, or at least compared with the one token that was said."""
        if not checked:
            self.control.observe_guess(name, guess.trust, 1, int(said[0] in guess.drafts.first))
            return
        num_right = len(said) - 1
        self._counts.add(len(checked), num_right)
        self.control.observe_guess(name, guess.trust, min(max(checked.depths), num_right + 1), num_right)


def _bears_guesses(seq: Sequence) -> bool:
    return seq.grammar is None or seq.grammar.bears_guesses
