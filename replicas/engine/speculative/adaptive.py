"""How many guesses are worth while, from what was measured: how often they come true, and what a step takes.

A step of B plain decodes takes T0 and gives B tokens. A chain of k guesses, each right with probability a, gives
a + a² + … + aᵏ tokens more, and k·t seconds. The best number makes (tokens ÷ seconds) largest; since guesses are worth
less the deeper they are, taking them one by one, best first, until the next would lower that quotient, finds it. With
one sequence this is the optimum of (1 - a^(k+1)) / ((1 - a)(1 + c·k)), c = t ÷ T0 (Leviathan et al. 2023); in a larger
batch T0 ÷ B is smaller beside t, so fewer guesses are: down to none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

MIN_GAIN = 1.05
"""Predicted gains below this are not worth the noise of the prediction."""

PRIOR_COST = 0.1
"""A guess's time beside a plain step's, until one was measured."""

_PRIOR_ACCEPTANCE = 0.6
_PRIOR_WEIGHT = 2.0  # what the engine knows of a kind of guess counts like so many tests of one request
_OWN_DECAY = 0.88
_ENGINE_DECAY = 0.998
_PLAIN_EVERY = 64
_DRAFTED_EVERY = 256
_NUM_PLAIN = 2
_NUM_TIMES = 7


@dataclass(slots=True)
class _Tally:
    """Guesses tested and confirmed, older ones counting less."""

    tested: float = 0.0
    confirmed: float = 0.0

    def add(self, tested: int, confirmed: int, decay: float) -> None:
        keep = decay**tested
        self.tested = self.tested * keep + tested
        self.confirmed = self.confirmed * keep + confirmed

    def blend(self, prior: float) -> float:
        return (self.confirmed + _PRIOR_WEIGHT * prior) / (self.tested + _PRIOR_WEIGHT)


class Acceptance:
    """Probability that a guess comes true, given that the one before did: by kind of guess, and by request."""

    def __init__(self) -> None:
        self._by_trust: dict[int, _Tally] = {}
        self._by_request: dict[str, _Tally] = {}

    def estimate(self, request_id: str, trust: int) -> float:
        """In (0, 1)."""
        prior = self._by_trust.get(trust, _Tally()).blend(_PRIOR_ACCEPTANCE)
        return min(0.99, self._by_request.get(request_id, _Tally()).blend(prior))

    def observe(self, request_id: str, trust: int, tested: int, confirmed: int) -> None:
        """So many guesses in a row were looked at, and so many were right: all, or all but the last."""
        self._by_trust.setdefault(trust, _Tally()).add(tested, confirmed, _ENGINE_DECAY)
        self._by_request.setdefault(request_id, _Tally()).add(tested, confirmed, _OWN_DECAY)

    def retain(self, running: frozenset[str]) -> None:
        """Forgets requests that do not run."""
        if len(self._by_request) > len(running):
            self._by_request = {name: tally for name, tally in self._by_request.items() if name in running}


@dataclass(slots=True)
class _Times:
    """The last few measurements, and how many steps ago one was taken."""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_TIMES))
    age: int = 0

    @property
    def median(self) -> float:
        return median(self.values)

    def add(self, value: float) -> None:
        self.values.append(value)
        self.age = 0


class Costs:
    """Seconds of steps that only decode, by number of sequences; medians, since machines hiccup."""

    def __init__(self) -> None:
        self._plain: dict[int, _Times] = {}
        self._per_draft: dict[int, _Times] = {}

    def plain_s(self, num_seqs: int) -> float | None:
        """A step without guesses; None while too few were seen."""
        times = self._plain.get(_bucket(num_seqs))
        return None if times is None or len(times.values) < _NUM_PLAIN else times.median

    def per_draft_s(self, num_seqs: int) -> float:
        """What a guess adds to a step, drafting and checking. Call when `plain_s` is known."""
        plain_s = self.plain_s(num_seqs)
        assert plain_s is not None
        times = self._per_draft.get(_bucket(num_seqs))
        return max(0.0, times.median) if times else PRIOR_COST * plain_s

    def wants_check(self, num_seqs: int) -> bool:
        """Whether it is so long that a step had guesses that its time is worth measuring anew."""
        times = self._per_draft.get(_bucket(num_seqs))
        return times is None or times.age >= _DRAFTED_EVERY

    def wants_plain(self, num_seqs: int) -> bool:
        """Whether the next step should be a plain one, to know what that takes."""
        times = self._plain.get(_bucket(num_seqs))
        return times is None or len(times.values) < _NUM_PLAIN or times.age >= _PLAIN_EVERY

    def observe(self, num_seqs: int, num_drafts: int, elapsed_s: float) -> None:
        """A step that only decoded has taken `elapsed_s` seconds, drafting included."""
        bucket = _bucket(num_seqs)
        if num_drafts == 0:
            self._plain.setdefault(bucket, _Times()).add(elapsed_s)
            self._per_draft.get(bucket, _Times()).age += 1
            return
        plain = self._plain.setdefault(bucket, _Times())
        plain.age += 1
        if plain.values:
            self._per_draft.setdefault(bucket, _Times()).add((elapsed_s - plain.median) / num_drafts)


@dataclass(frozen=True, slots=True)
class Offer:
    """Guesses that could be checked: so many in a chain, each right with probability `acceptance`."""

    request_id: str
    num_drafts: int
    acceptance: float


def best_lengths(offers: Iterable[Offer], num_seqs: int, plain_s: float, per_draft_s: float) -> Mapping[str, int]:
    """How many of each offer to check so that tokens per second become most; only those with any."""
    steps = sorted(
        ((offer.acceptance**k, offer.request_id, k) for offer in offers for k in range(1, offer.num_drafts + 1)),
        reverse=True,
    )
    tokens, seconds = float(num_seqs), plain_s
    lengths: dict[str, int] = {}
    for gain, request_id, length in steps:
        if gain * seconds <= per_draft_s * tokens:
            break
        lengths[request_id] = length
        tokens += gain
        seconds += per_draft_s
    return lengths if tokens * plain_s >= MIN_GAIN * num_seqs * seconds else {}


def expected_tokens(acceptance: float, num_drafts: int) -> float:
    """Tokens a step gives one sequence: (1 - a^(K+1)) / (1 - a)."""
    return float(sum(acceptance**k for k in range(num_drafts + 1)))


def _bucket(num_seqs: int) -> int:
    """Numbers of sequences within an eighth of each other share their measurements."""
    shift = max(0, num_seqs.bit_length() - 4)
    return num_seqs >> shift << shift
