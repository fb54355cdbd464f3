"""The way every benchmark measures: sides in turn (A B A B …), at least five pairs, medians with their spread.

Taking turns lets a drift of the machine fall on all sides alike; ratios are formed within a pair, then summarised.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from ops.errors import OperationError

Sample: TypeAlias = Mapping[str, float]
"""What one visit to one side measured, by metric."""

MIN_REPEATS = 5
"""Pairs a recorded figure needs."""


class BenchError(OperationError):
    """A benchmark cannot run, or its answers were wrong; the message says which and why."""


class Side(Protocol):
    """One contestant. `start` and `stop` bracket all of its samples."""

    @property
    def name(self) -> str: ...

    async def start(self) -> None: ...

    async def sample(self) -> Sample:
        """Runs the workload once. Raises BenchError when an answer is wrong."""
        ...

    async def stop(self) -> None:
        """Ends what `start` began; also after a failed start."""
        ...


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and what lies around it."""

    median: float
    low: float
    high: float
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit on a figure: `at_least` or `at_most` `limit`, or `within` that share of 1."""

    kind: str
    limit: float

    @classmethod
    def at_least(cls, limit: float) -> Goal:
        return cls("≥", limit)

    @classmethod
    def at_most(cls, limit: float) -> Goal:
        return cls("≤", limit)

    @classmethod
    def within(cls, share: float) -> Goal:
        return cls("1 ±", share)

    def met_by(self, value: float) -> bool:
        if self.kind == "1 ±":
            return abs(value - 1) <= self.limit
        return value >= self.limit if self.kind == "≥" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.kind} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Ratio:
    """One side's metric over another's, pair by pair."""

    metric: str
    side: str
    against: str
    spread: Spread
    goal: Goal | None = None

    @property
    def reached(self) -> bool | None:
        return None if self.goal is None else self.goal.met_by(self.spread.median)


@dataclass(slots=True)
class Samples:
    """Every sample by side, in the order taken: index i of all sides belongs to round i."""

    by_side: dict[str, list[Sample]] = field(default_factory=dict)

    def spread(self, side: str, metric: str) -> Spread:
        return Spread.of([sample[metric] for sample in self.by_side[side]])

    def metrics(self, side: str) -> list[str]:
        samples = self.by_side[side]
        return list(samples[0]) if samples else []

    def ratio(self, metric: str, side: str, against: str, goal: Goal | None = None) -> Ratio:
        """`side`'s metric over `against`'s; raises BenchError when a divisor is 0."""
        pairs = list(zip(self.by_side[side], self.by_side[against], strict=True))
        if any(not theirs[metric] for _, theirs in pairs):
            raise BenchError(f"{against} measured 0 {metric}: nothing to divide by; run longer")
        return Ratio(metric, side, against, Spread.of([ours[metric] / theirs[metric] for ours, theirs in pairs]), goal)

    def comparable(self, *sides: str) -> bool:
        """Whether all of these were measured."""
        return all(self.by_side.get(side) for side in sides)


@dataclass(frozen=True, slots=True)
class Plan:
    """How often: `num_warmups` rounds that do not count, then `num_repeats` that do."""

    num_repeats: int = MIN_REPEATS
    num_warmups: int = 1


Notice: TypeAlias = Callable[[str], None]
"""Called before each visit with words for a progress display."""


async def alternate(sides: Sequence[Side], plan: Plan, notice: Notice) -> Samples:
    """Starts every side, visits them in turn `plan.num_warmups + plan.num_repeats` times, stops every side."""
    samples = Samples({side.name: [] for side in sides})
    async with AsyncExitStack() as begun:
        for side in sides:
            notice(f"starting {side.name}")
            begun.push_async_callback(side.stop)
            await side.start()
        for round_index in range(plan.num_warmups + plan.num_repeats):
            counted = round_index >= plan.num_warmups
            for side in sides:
                which = f"{round_index - plan.num_warmups + 1}/{plan.num_repeats}" if counted else "warm-up"
                notice(f"{side.name} {which}")
                sample = await side.sample()
                if counted:
                    samples.by_side[side.name].append(sample)
    return samples
