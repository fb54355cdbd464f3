"""How much is guessed and how much of it checked, step by step. Three ways, by what guessing costs.

ask(names) ─► the drafter guesses that much ─► pick(guesses) ─► that much is checked
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from typing import Protocol

from replicas.engine.speculative.adaptive import MIN_GAIN, Acceptance, Costs, Offer, best_lengths
from replicas.engine.speculative.drafter import Guess

PROBE_STEPS = 4
"""Guesses that were not worth while are tried again so many steps on end: the first of them catches up."""

_MIN_PROBE_PERIOD = 64
_MAX_PROBE_SHARE = 0.005  # of the time of plain steps

_TRIAL_STEPS = 24
_MAX_LOSS = 6.0  # a trial may cost so many plain steps
_FIRST_WAIT = 600  # steps from the end of a trial to the next: a hundred times its loss
_LAST_WAIT = 10_000
_MEAN_SHARE = 0.03


class Control(Protocol):
    """Decides how much speculation each step has. `names` are the requests that decode in it."""

    def ask(self, names: Rows[str]) -> Mapping[str, int]:
        """How many guesses, at most, each of them is to get; those left out get none."""
        ...

    def pick(self, names: Rows[str], guesses: Mapping[str, Guess]) -> Mapping[str, int]:
        """How many of the guesses made are to be checked."""
        ...

    def observe_guess(self, name: str, trust: int, num_tested: int, num_right: int) -> None:
        """So many guesses in a row were compared with the model's draws, and so many were right."""
        ...

    def observe_step(self, num_seqs: int, num_drafts: int, elapsed_s: float) -> None:
        """A step in which every sequence decoded has taken so long."""
        ...


class Fixed:
    """Always as many: for measurements."""

    def __init__(self, max_drafts: int) -> None:
        self._max_drafts = max_drafts

    def ask(self, names: Rows[str]) -> Mapping[str, int]:
        return dict.fromkeys(names, self._max_drafts)

    def pick(self, names: Rows[str], guesses: Mapping[str, Guess]) -> Mapping[str, int]:
        return dict.fromkeys(guesses, self._max_drafts)

    def observe_guess(self, name: str, trust: int, num_tested: int, num_right: int) -> None: ...

    def observe_step(self, num_seqs: int, num_drafts: int, elapsed_s: float) -> None: ...


class FreeGuesses:
    """For drafters that take next to no time: everyone is guessed for, always; what is not checked still teaches."""

    def __init__(self, max_drafts: int) -> None:
        self.acceptance = Acceptance()
        self.costs = Costs()
        self._max_drafts = max_drafts

    def ask(self, names: Rows[str]) -> Mapping[str, int]:
        """See `Control.ask`."""
        self.acceptance.retain(frozenset(names))
        return dict.fromkeys(names, self._max_drafts)

    def pick(self, names: Rows[str], guesses: Mapping[str, Guess]) -> Mapping[str, int]:
        """See `Control.pick`."""
        plain_s = self.costs.plain_s(len(names))
        if plain_s is None or self.costs.wants_plain(len(names)):
            return {}
        offers = [
            Offer(name, len(guess.drafts), self.acceptance.estimate(name, guess.trust))
            for name, guess in guesses.items()
        ]
        lengths = best_lengths(offers, len(names), plain_s, self.costs.per_draft_s(len(names)))
        if not lengths and offers and self.costs.wants_check(len(names)):
            return {max(offers, key=lambda offer: offer.acceptance).request_id: 1}
        return lengths

    def observe_guess(self, name: str, trust: int, num_tested: int, num_right: int) -> None:
        """See `Control.observe_guess`."""
        self.acceptance.observe(name, trust, num_tested, num_right)

    def observe_step(self, num_seqs: int, num_drafts: int, elapsed_s: float) -> None:
        """See `Control.observe_step`."""
        self.costs.observe(num_seqs, num_drafts, elapsed_s)


class CostlyGuesses:
    """For drafters that compute: only who is worth it is guessed for; the others are tried again now and then."""

    def __init__(self, max_drafts: int) -> None:
        self.acceptance = Acceptance()
        self.costs = Costs()
        self._max_drafts = max_drafts
        self._step = 0
        self._tried: dict[str, int] = {}  # step at which a request was last guessed for

    def ask(self, names: Rows[str]) -> Mapping[str, int]:
        """See `Control.ask`."""
        self._step += 1
        self.acceptance.retain(frozenset(names))
        self._tried = {name: self._tried.get(name, self._step) for name in names}
        plain_s = self.costs.plain_s(len(names))
        if plain_s is None or self.costs.wants_plain(len(names)):
            return {}
        per_draft_s = self.costs.per_draft_s(len(names))
        offers = [Offer(name, self._max_drafts, self.acceptance.estimate(name, 0)) for name in names]
        lengths = dict(best_lengths(offers, len(names), plain_s, per_draft_s))
        self._tried.update(dict.fromkeys(lengths, self._step))
        return lengths | self._probes(lengths, per_draft_s / plain_s)

    def _probes(self, lengths: Mapping[str, int], cost: float) -> dict[str, int]:
        """One guess for the request that has waited longest for another try, when it is its turn."""
        period = max(_MIN_PROBE_PERIOD, PROBE_STEPS * cost / _MAX_PROBE_SHARE)
        name = min(self._tried.keys() - lengths.keys(), key=lambda name: (self._tried[name], name), default=None)
        if name is None or self._step - self._tried[name] < period:
            return {}
        if self._step - self._tried[name] >= period + PROBE_STEPS - 1:
            self._tried[name] = self._step
        return {name: 1}

    def pick(self, names: Rows[str], guesses: Mapping[str, Guess]) -> Mapping[str, int]:
        """See `Control.pick`: whatever was guessed."""
        return {name: len(guess.drafts) for name, guess in guesses.items()}

    def observe_guess(self, name: str, trust: int, num_tested: int, num_right: int) -> None:
        """See `Control.observe_guess`."""
        self.acceptance.observe(name, trust, num_tested, num_right)

    def observe_step(self, num_seqs: int, num_drafts: int, elapsed_s: float) -> None:
        """See `Control.observe_step`."""
        self.costs.observe(num_seqs, num_drafts, elapsed_s)


class Trials:
    """For trees of one size: on for everybody or off, by what a trial gave. Trials that fail become rare."""

    def __init__(self, num_rows: int) -> None:
        self.costs = Costs()
        self._num_rows = num_rows
        self._trial: _Trial | None = None
        self._wait = _FIRST_WAIT
        self._steps_left = 0

    @property
    def is_on(self) -> bool:
        return self._trial is not None

    def ask(self, names: Rows[str]) -> Mapping[str, int]:
        """See `Control.ask`."""
        if self.costs.plain_s(len(names)) is None or self.costs.wants_plain(len(names)):
            return {}
        self._steps_left -= self._trial is None
        if self._trial is None and self._steps_left < 0:
            self._trial = _Trial()
        return {} if self._trial is None else dict.fromkeys(names, self._num_rows)

    def pick(self, names: Rows[str], guesses: Mapping[str, Guess]) -> Mapping[str, int]:
        """See `Control.pick`."""
        return dict.fromkeys(guesses, self._num_rows)

    def observe_guess(self, name: str, trust: int, num_tested: int, num_right: int) -> None:
        """See `Control.observe_guess`."""
        if self._trial is not None:
            self._trial.tokens.add(1.0 + num_right)

    def observe_step(self, num_seqs: int, num_drafts: int, elapsed_s: float) -> None:
        """See `Control.observe_step`. Ends a trial, or what a trial began, when it does not pay."""
        self.costs.observe(num_seqs, num_drafts, elapsed_s)
        plain_s = self.costs.plain_s(num_seqs)
        if self._trial is None or num_drafts == 0 or plain_s is None:
            return
        self._trial.seconds.add(elapsed_s / plain_s)
        if self._trial.pays:
            self._wait = _FIRST_WAIT
        if self._trial.fails:
            self._trial = None
            self._steps_left = self._wait
            self._wait = min(2 * self._wait, _LAST_WAIT)


class _Trial:
    """How speculation fares since it was switched on: tokens a sequence and step, and the step's time in plain ones."""

    def __init__(self) -> None:
        self.tokens = _Mean()
        self.seconds = _Mean()

    @property
    def pays(self) -> bool:
        return self.seconds.num >= _TRIAL_STEPS and self.tokens.value >= MIN_GAIN * self.seconds.value

    @property
    def fails(self) -> bool:
        """After a while it does not pay; or at once it is hopeless."""
        num, loss = self.seconds.num, self.seconds.value - self.tokens.value
        return (num >= _TRIAL_STEPS and not self.pays) or num * loss > _MAX_LOSS


class _Mean:
    """Of the last thirty-odd values, mostly."""

    def __init__(self) -> None:
        self.num = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        self.num += 1
        self.value += max(1 / self.num, _MEAN_SHARE) * (value - self.value)
