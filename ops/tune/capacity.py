"""The largest request rate that one candidate serves in time, looked for on a ladder of rates.

    all at once ─► saturation ─► the highest rung that is tried
    rungs: from a guess up or down in growing strides until one is met and the next tried is not, then by halving

The rungs are the same for all candidates and engines, as are the prompts and arrival times on a rung: so rates compare,
and two candidates can tie.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import floor, log2
from typing import Protocol, TypeAlias

from ops.tune.findings import Rate, Run
from ops.tune.workload import Slo

RUNGS_PER_OCTAVE = 8
"""Neighbours are 9 % apart, finer than runs of some fifty requests can tell."""

NUM_RUNGS = 24
"""Below an eighth of saturation nothing is tried."""

FIRST_BELOW = 3
"""The first guess: so many rungs below saturation, at three quarters of it."""

Measure: TypeAlias = Callable[[Rate], Awaitable[Run]]
"""Runs a candidate under a load."""


class Ladder(Protocol):
    """Rates in rising order, by number."""

    def rate(self, rung: int) -> float: ...

    def bounds(self, saturation_per_s: float) -> tuple[int, int]:
        """The lowest and the highest rung to try."""
        ...


@dataclass(frozen=True, slots=True)
class Grid:
    """Rates 2^(k/8). None above saturation: a run would only meet the SLO there because it ends before the queue is
    long."""

    def rate(self, rung: int) -> float:
        return float(f"{2 ** (rung / RUNGS_PER_OCTAVE):.4g}")

    def bounds(self, saturation_per_s: float) -> tuple[int, int]:
        top = floor(RUNGS_PER_OCTAVE * log2(saturation_per_s))
        return top - NUM_RUNGS, top


@dataclass(frozen=True, slots=True)
class Stated:
    """The rates that somebody asked for, rising."""

    rates: tuple[float, ...]

    def rate(self, rung: int) -> float:
        return self.rates[rung]

    def bounds(self, saturation_per_s: float) -> tuple[int, int]:
        return 0, len(self.rates) - 1


@dataclass(frozen=True, slots=True)
class Capacity:
    """`rung`: the highest that was met, None: none was. `is_bound`: it is only known to be below what was to be beaten.

    `runs`: every rung tried, rising."""

    closed: Run
    rung: int | None
    best: Run | None
    runs: tuple[Run, ...]
    is_bound: bool = False


async def capacity(measure: Measure, slo: Slo, ladder: Ladder, to_beat: int | None = None) -> Capacity:
    """Measures until the highest rung that is met is known; a candidate that does not meet rung `to_beat`, or is
    saturated below it, is left there."""
    closed = await measure(None)
    lowest, top = ladder.bounds(closed.requests_per_s)
    climb = _Climb(measure, slo, ladder)
    if to_beat is not None and (top < to_beat or not await climb.holds(to_beat)):
        return climb.result(closed, is_bound=True)
    first = max(lowest, top - FIRST_BELOW)
    if to_beat is not None:
        lowest, first = to_beat, min(to_beat + 1, top)
    low, high = await climb.bracket(first, lowest, top)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if await climb.holds(middle) else (low, middle)
    return climb.result(closed)


class _Climb:
    """What is known of each rung so far."""

    def __init__(self, measure: Measure, slo: Slo, ladder: Ladder) -> None:
        self._measure = measure
        self._slo = slo
        self._ladder = ladder
        self._runs: dict[int, Run] = {}

    async def holds(self, rung: int) -> bool:
        """Tries a rung, once."""
        if rung not in self._runs:
            self._runs[rung] = await self._measure(self._ladder.rate(rung))
        return self._runs[rung].meets(self._slo)

    async def bracket(self, first: int, lowest: int, top: int) -> tuple[int, int]:
        """A rung that holds and a higher one that does not; beyond an end of the ladder, it is taken to be so."""
        here, stride, up = first, 2, await self.holds(first)
        while here != (end := top if up else lowest):
            following = min(here + stride, end) if up else max(here - stride, end)
            if await self.holds(following) != up:
                return (here, following) if up else (following, here)
            here, stride = following, 2 * stride
        return (here, here + 1) if up else (here - 1, here)

    def result(self, closed: Run, *, is_bound: bool = False) -> Capacity:
        met = [rung for rung, run in self._runs.items() if run.meets(self._slo)]
        rung = None if is_bound or not met else max(met)
        best = None if rung is None else self._runs[rung]
        return Capacity(closed, rung, best, tuple(self._runs[k] for k in sorted(self._runs)), is_bound)
