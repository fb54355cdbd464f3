"""Sides in turn, what counts, and what is summed up from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from ops.bench.harness import BenchError, Goal, Plan, Sample, Samples, Spread, alternate


@dataclass
class Scripted:
    """A side that logs its visits and answers with numbers given; `breaks` names the act that raises."""

    name: str
    log: list[str]
    values: Iterator[float] = field(default_factory=lambda: iter(range(1, 100)))
    breaks: str = ""

    async def start(self) -> None:
        self._act("start")

    async def sample(self) -> Sample:
        self._act("sample")
        return {"rate": float(next(self.values))}

    async def stop(self) -> None:
        self._act("stop")

    def _act(self, act: str) -> None:
        self.log.append(f"{act} {self.name}")
        if act == self.breaks:
            raise BenchError(f"{self.name} breaks at {act}")


def unheard(_: str) -> None:
    pass


def samples(**by_side: list[float]) -> Samples:
    return Samples({side: [{"rate": value} for value in values] for side, values in by_side.items()})


async def test_sides_take_turns_between_one_start_and_one_stop() -> None:
    log: list[str] = []
    await alternate([Scripted("A", log), Scripted("B", log)], Plan(num_repeats=3, num_warmups=1), unheard)
    turns = ["sample A", "sample B"] * 4
    assert log == ["start A", "start B", *turns, "stop B", "stop A"]


async def test_warm_up_rounds_are_run_and_not_counted() -> None:
    a, b = Scripted("A", [], iter([99, 98, 1, 2])), Scripted("B", [], iter([97, 96, 3, 4]))
    found = await alternate([a, b], Plan(num_repeats=2, num_warmups=2), unheard)
    assert found.by_side == {"A": [{"rate": 1.0}, {"rate": 2.0}], "B": [{"rate": 3.0}, {"rate": 4.0}]}


async def test_notices_name_every_start_and_visit_before_it_happens() -> None:
    log: list[str] = []
    await alternate([Scripted("A", log)], Plan(2, 1), lambda words: log.append(f"“{words}”"))
    assert log == [
        *("“starting A”", "start A"),
        *("“A warm-up”", "sample A", "“A 1/2”", "sample A", "“A 2/2”", "sample A"),
        "stop A",
    ]


async def test_side_that_fails_to_start_is_stopped_and_so_are_those_before_it() -> None:
    log: list[str] = []
    sides = [Scripted("A", log), Scripted("B", log, breaks="start"), Scripted("C", log)]
    with pytest.raises(BenchError, match="B breaks at start"):
        await alternate(sides, Plan(), unheard)
    assert log == ["start A", "start B", "stop B", "stop A"]


async def test_side_that_fails_in_a_visit_ends_the_run_and_all_are_stopped() -> None:
    log: list[str] = []
    with pytest.raises(BenchError, match="A breaks at sample"):
        await alternate([Scripted("A", log, breaks="sample"), Scripted("B", log)], Plan(), unheard)
    assert log == ["start A", "start B", "sample A", "stop B", "stop A"]


async def test_side_that_fails_to_stop_does_not_keep_the_others_running() -> None:
    log: list[str] = []
    sides = [Scripted("A", log), Scripted("B", log, breaks="stop")]
    with pytest.raises(BenchError, match="B breaks at stop"):
        await alternate(sides, Plan(1, 0), unheard)
    assert log[-2:] == ["stop B", "stop A"]


def test_ratio_is_formed_within_each_pair_before_it_is_summed_up() -> None:
    ratio = samples(ours=[10, 40, 30], theirs=[10, 20, 10]).ratio("rate", "ours", "theirs")
    assert (ratio.metric, ratio.side, ratio.against) == ("rate", "ours", "theirs")
    assert ratio.spread == Spread(median=2.0, low=1.0, high=3.0, num=3)
    # A ratio of the medians would be 3.
    assert ratio.goal is None and ratio.reached is None


def test_ratio_over_zero_is_a_bench_error_that_names_the_side_and_metric() -> None:
    found = samples(ours=[1, 2], theirs=[1, 0])
    with pytest.raises(BenchError, match="theirs measured 0 rate"):
        found.ratio("rate", "ours", "theirs")
    assert found.ratio("rate", "theirs", "ours").spread.low == 0


def test_sides_with_different_numbers_of_samples_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="shorter"):
        samples(ours=[1, 2], theirs=[1]).ratio("rate", "ours", "theirs")


def test_only_sides_that_were_measured_can_be_compared() -> None:
    found = samples(ours=[1], theirs=[2], none=[])
    assert found.comparable("ours", "theirs")
    assert not found.comparable("ours", "none")
    assert not found.comparable("ours", "unknown")
    assert found.metrics("none") == [] and found.metrics("ours") == ["rate"]


@pytest.mark.parametrize(
    ("goal", "reached", "words"),
    [
        (Goal.at_least(2.0), True, "≥ 2"),
        (Goal.at_least(2.01), False, "≥ 2.01"),
        (Goal.at_most(2.0), True, "≤ 2"),
        (Goal.at_most(1.99), False, "≤ 1.99"),
    ],
)
def test_goal_is_judged_by_the_median_and_includes_its_limit(goal: Goal, reached: bool, words: str) -> None:
    ratio = samples(ours=[1, 2, 9], theirs=[1, 1, 1]).ratio("rate", "ours", "theirs", goal)
    assert ratio.reached is reached
    assert str(goal) == words


def test_spread_is_the_median_and_the_extremes() -> None:
    spread = Spread.of([4.0, 1.0, 2.0, 3.0])
    assert spread == Spread(2.5, 1.0, 4.0, 4)
    assert str(Spread.of([1234.5678, 0.00012345])) == "617.3 (0.0001234 to 1235)"
