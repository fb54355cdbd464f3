"""The largest rate in time, looked for on a made-up engine whose capacity is known."""

from __future__ import annotations

from math import floor, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.tune.capacity import NUM_RUNGS, RUNGS_PER_OCTAVE, Grid, Stated, capacity
from ops.tune.findings import Rate, Run
from tests.ops.tune.made_up import SLO, MadeUp, made_run

ABLE = st.floats(0.05, 5000.0)


def rung_below(rate: float) -> int:
    return next(k for k in range(floor(RUNGS_PER_OCTAVE * log2(rate)) + 2, -200, -1) if Grid().rate(k) <= rate)


@settings(deadline=None)
@given(able=ABLE, headroom=st.floats(1.05, 6.0))
async def test_the_highest_rung_in_time_is_found(able: float, headroom: float) -> None:
    made_up = MadeUp(lambda _: able, headroom)
    found = await made_up.measured({"a": 1})
    assert found.rung == rung_below(able)
    assert found.best is not None and found.best.meets(SLO) and not found.is_bound
    assert len(made_up.runs) <= 10, made_up.runs


@settings(deadline=None)
@given(able=ABLE)
async def test_no_rate_above_saturation_is_tried(able: float) -> None:
    made_up = MadeUp(lambda _: able * 100, headroom=0.01)
    await made_up.measured({"a": 1})
    assert all(rate <= able * 1.0001 for _, rate in made_up.runs if rate is not None)


async def test_where_nothing_is_in_time_the_search_ends_an_eighth_below_saturation() -> None:
    made_up = MadeUp(lambda _: 1e-6, headroom=10e6)
    found = await made_up.measured({"a": 1})
    assert (found.rung, found.best, found.is_bound) == (None, None, False)
    assert len(found.runs) <= 6
    assert found.runs[0].rate == Grid().rate(floor(RUNGS_PER_OCTAVE * log2(10)) - NUM_RUNGS)


@settings(deadline=None)
@given(able=ABLE, other=ABLE)
async def test_a_candidate_that_cannot_beat_the_best_is_left_after_two_runs(able: float, other: float) -> None:
    to_beat = rung_below(other)
    made_up = MadeUp(lambda _: able)
    found = await made_up.measured({"a": 1}, to_beat)
    if rung_below(able) < to_beat:
        assert (found.rung, found.is_bound) == (None, True)
        assert len(made_up.runs) <= 2
    else:
        assert found.rung == rung_below(able)
        assert all(rate is None or rate >= Grid().rate(to_beat) for _, rate in made_up.runs)


@pytest.mark.parametrize(("able", "expected"), [(0.5, None), (1.0, 0), (2.5, 1), (9.0, 2)])
async def test_stated_rates_are_the_only_ones(able: float, expected: int | None) -> None:
    tried: list[Rate] = []

    async def measure(rate: Rate) -> Run:
        tried.append(rate)
        return made_run({}, rate, able, able)

    found = await capacity(measure, SLO, Stated((1.0, 2.0, 4.0)))
    assert found.rung == expected
    assert set(tried) <= {None, 1.0, 2.0, 4.0}
