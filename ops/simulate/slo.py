"""Which answers came in time.

A request is in time when its first token comes within max(`floor_s`, `factor` × the seconds its whole prompt would take
alone, with nothing cached): a target that does not depend on who routes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from ops.simulate.calibration import Calibration
from ops.simulate.trace import TraceRequest


@dataclass(frozen=True, slots=True)
class Slo:
    """A load is sustained when `attainment` of all requests are in time."""

    floor_s: float = 1.0
    factor: float = 2.0
    attainment: float = 0.95

    def target_s(self, request: TraceRequest, calibration: Calibration) -> float:
        """Seconds to the first token that count as in time."""
        return max(self.floor_s, self.factor * request.num_prompt / calibration.prefill_tokens_per_s)


class Answered(Protocol):
    """What is known of a request so far: seconds on the virtual clock; `first_s` is 0 until its first token came."""

    @property
    def arrival_s(self) -> float: ...

    @property
    def first_s(self) -> float: ...


class Hopes:
    """Whether a run can still turn out sustained: counts the misses as soon as they are certain.

    A request whose deadline has passed without a first token is a miss, whenever that will come. Never counts one that
    `ops.simulate.result` would not count at the end.
    """

    def __init__(self, slo: Slo, targets_s: Sequence[float], outcomes: Sequence[Answered]) -> None:
        self._attainment = slo.attainment
        self._targets_s = targets_s
        self._outcomes = outcomes
        self._open: list[tuple[float, int]] = []  # (deadline, request), the next first
        self.num_missed = 0

    @property
    def any(self) -> bool:
        """Whether enough would be in time if all others were."""
        num = len(self._outcomes)
        return (num - self.num_missed) / num >= self._attainment

    def arrived(self, index: int, now: float) -> None:
        """A request came just now."""
        heappush(self._open, (now + self._targets_s[index], index))

    def look(self, now: float) -> None:
        """Takes in the deadlines that have passed by now."""
        waiting = self._open
        while waiting and waiting[0][0] < now:
            _, index = heappop(waiting)
            outcome = self._outcomes[index]
            told_s = outcome.first_s or now
            self.num_missed += told_s - outcome.arrival_s > self._targets_s[index]
