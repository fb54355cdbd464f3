"""The largest load at which enough answers come in time, looked for on a ladder of loads.

    load of rung k = (1 + tolerance)^k        a rung holds: its load is sustained

From a first guess upwards (or downwards) in growing strides until one rung holds and a higher one does not, then by
halving. Rungs do not depend on the guess: it only says where to look first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import TypeAlias

from ops.simulate.driver import run, run_while_sustained
from ops.simulate.fleet import FleetSpec
from ops.simulate.result import Result
from ops.simulate.trace import Trace
from routing.policies import PolicySpec

FIRST_LOAD = 0.5
MIN_LOAD = 0.01
MAX_LOAD = 200.0

FAR = 1.5
"""The first stride, as a factor of load, from a guess that nothing supports."""

NEAR = 1.06
"""The same from a capacity that was found in a similar fleet."""

Attempt: TypeAlias = Callable[[Trace, str | PolicySpec, FleetSpec, float], Result | None]
"""What a load comes to; None: it is not sustained. `run` plays it to its end in any case."""


@dataclass(frozen=True, slots=True)
class Search:
    """How a capacity is looked for. `near`: a load it is probably close to; None: nobody knows.

    `attempt`: `run_while_sustained` is done with a hopeless load soon; `run` says how hopeless it is.
    """

    tolerance: float = 0.01
    near: float | None = None
    attempt: Attempt = run_while_sustained


@dataclass(frozen=True, slots=True)
class Capacity:
    """`load`: the largest found that is sustained, a rung below one that is not; 0 when none is.

    `result` is the run at that load (at the smallest tried, when none is sustained); `curve` has (load, attainment) of
    every load tried whose attainment is known, in order.
    """

    load: float
    result: Result
    curve: tuple[tuple[float, float], ...]


def capacity(trace: Trace, policy: str | PolicySpec, fleet: FleetSpec, search: Search | None = None) -> Capacity:
    """SLO capacity (see `ops.simulate.slo`), of a policy at a fleet.

    Attainment falls with load but for noise; with noise, this finds one crossing of the line.
    """
    search = search or Search()
    ladder = _Ladder(search, lambda load: search.attempt(trace, policy, fleet, load))
    rung = ladder.highest()
    if rung is None:
        lowest = ladder.load(ladder.lowest)
        return Capacity(0.0, run(trace, policy, fleet, lowest), ladder.curve())
    best = ladder.results[rung]
    assert best is not None
    return Capacity(ladder.load(rung), best, ladder.curve())


class _Ladder:
    """What is known of each rung so far: `results`, None for those that do not hold."""

    def __init__(self, search: Search, attempt: Callable[[float], Result | None]) -> None:
        self._factor = 1 + search.tolerance
        self._attempt = attempt
        self.lowest = self._rung(MIN_LOAD)
        self._highest = self._rung(MAX_LOAD)
        guess = search.near or FIRST_LOAD
        self._first = min(max(self.lowest, self._rung(guess)), self._highest)
        self._stride = max(1, round(log(NEAR if search.near else FAR, self._factor)))
        self._attainment: dict[float, float] = {}
        self.results: dict[int, Result | None] = {}

    def load(self, rung: int) -> float:
        """Four digits tell any two rungs apart."""
        return float(f"{self._factor**rung:.4g}")

    def highest(self) -> int | None:
        """The highest that holds, as far as can be told by trying few; None when none does."""
        low, high = self._bracket()
        while high - low > 1:
            middle = (low + high) // 2
            if self._holds(middle):
                low = middle
            else:
                high = middle
        return low if self.results.get(low) is not None else None

    def curve(self) -> tuple[tuple[float, float], ...]:
        return tuple(sorted(self._attainment.items()))

    def _bracket(self) -> tuple[int, int]:
        """A rung that holds and a higher one that does not; beyond an end of the ladder, it is taken to be so."""
        here, stride = self._first, self._stride
        up = self._holds(here)
        while here != (end := self._highest if up else self.lowest):
            following = min(here + stride, end) if up else max(here - stride, end)
            if self._holds(following) != up:
                return (here, following) if up else (following, here)
            here, stride = following, 2 * stride
        return (here, here + 1) if up else (here - 1, here)

    def _holds(self, rung: int) -> bool:
        """Tries a rung."""
        load = self.load(rung)
        result = self._attempt(load)
        if result is not None:
            self._attainment[load] = result.attainment
            if not result.sustained:
                result = None
        self.results[rung] = result
        return result is not None

    def _rung(self, load: float) -> int:
        return round(log(load, self._factor))
