"""The largest load at which enough answers come in time, by bracketing and bisection."""

from __future__ import annotations

from dataclasses import dataclass

from ops.simulate.driver import run
from ops.simulate.fleet import FleetSpec
from ops.simulate.result import Result
from ops.simulate.trace import Trace
from routing.policies import PolicySpec

FIRST_LOAD = 0.5
GROWTH = 1.5
MIN_LOAD = 0.01
MAX_LOAD = 200.0


@dataclass(frozen=True, slots=True)
class Capacity:
    """`load`: the largest found that is sustained, within `tolerance` of one that is not; 0 when none is.

    `result` is the run at that load (at the smallest tried, when none is sustained); `curve` has (load, attainment) of
    every load tried, in order.
    """

    load: float
    result: Result
    curve: tuple[tuple[float, float], ...]


def capacity(trace: Trace, policy: str | PolicySpec, fleet: FleetSpec, tolerance: float = 0.01) -> Capacity:
    """SLO capacity (see `ops.simulate.slo`), of a policy at a fleet.

    Attainment falls with load but for noise; with noise, this finds one crossing of the line.
    """
    tried: dict[float, Result] = {}

    def sustained(load: float) -> bool:
        tried[load] = run(trace, policy, fleet, load)
        return tried[load].sustained

    low = high = FIRST_LOAD
    if sustained(low):
        while high < MAX_LOAD and sustained(high := low * GROWTH):
            low = high
    else:
        while low > MIN_LOAD and not sustained(low := high / GROWTH):
            high = low
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        if sustained(middle):
            low = middle
        else:
            high = middle
    best = max((load for load, result in tried.items() if result.sustained), default=0.0)
    curve = tuple(sorted((load, result.attainment) for load, result in tried.items()))
    return Capacity(best, tried[best or min(tried)], curve)
