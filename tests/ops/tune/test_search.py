"""Which candidates are tried and which wins, on made-up engines."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from ops.tune.capacity import Grid
from ops.tune.errors import TrialError
from ops.tune.findings import Values, key_of
from ops.tune.search import Outcome, Search, is_better
from tests.ops.tune.made_up import MadeUp

SPACE = {"a": (4, 1, 2, 8, 16), "b": (10, 20, 40)}


def hill(values: Values) -> float:
    """The best is a=8, b=20; along each knob it rises towards them."""
    a, b = values["a"], values["b"]
    assert a is not None and b is not None
    return 10 / (1 + abs(a - 8) / 4) / (1 + abs(b - 20) / 20)


async def test_knob_after_knob_finds_the_top_of_a_hill_with_few_candidates() -> None:
    made_up, search = MadeUp(hill), Search(SPACE)
    await search.along_knobs(made_up.evaluate)
    assert search.best is not None and dict(search.best.values) == {"a": 8, "b": 20}
    assert len(search.outcomes) < len(list(product(*SPACE.values())))


@settings(deadline=None)
@given(st.lists(st.floats(1.0, 50.0), min_size=15, max_size=15))
async def test_every_combination_finds_the_best_of_all(capacities: list[float]) -> None:
    combinations = [dict(zip(SPACE, values, strict=True)) for values in product(*SPACE.values())]
    able = {key_of(values): capacity for values, capacity in zip(combinations, capacities, strict=True)}
    made_up, search = MadeUp(lambda values: able[key_of(values)]), Search(SPACE)
    await search.everywhere(made_up.evaluate)
    assert search.best is not None and search.best.capacity is not None
    rung = search.best.capacity.rung
    assert rung is not None
    assert max(capacities) < Grid().rate(rung + 1)
    assert len(search.outcomes) == search.num_expected(grid=True) == 15


async def test_a_failing_candidate_is_an_outcome_and_not_the_end() -> None:
    def broken(values: Values) -> float:
        if values["a"] == 8:
            raise TrialError("no memory")
        return hill(values)

    search = Search(SPACE)
    await search.along_knobs(MadeUp(broken).evaluate)
    failed = [outcome for outcome in search.outcomes if outcome.capacity is None]
    assert {outcome.reason for outcome in failed} == {"no memory"}
    assert search.best is not None and search.best.capacity is not None and search.best.values["a"] != 8


async def test_where_the_profile_itself_fails_others_are_tried_around_it() -> None:
    def broken(values: Values) -> float:
        if values["b"] == 10:
            raise TrialError("no memory")
        return hill(values)

    search = Search(SPACE)
    await search.along_knobs(MadeUp(broken).evaluate)
    assert search.best is not None and dict(search.best.values) == {"a": 8, "b": 20}


async def test_impossible_candidates_are_not_tried() -> None:
    made_up = MadeUp(hill)
    search = Search(SPACE, lambda values: values != {"a": 8, "b": 20})
    await search.everywhere(made_up.evaluate)
    assert all(values != {"a": 8, "b": 20} for values, _ in made_up.runs)
    assert search.num_expected(grid=True) == 14


async def outcome(values: Values, able: float, headroom: float = 1.5) -> Outcome:
    return await MadeUp(lambda _: able, headroom).evaluate(values, None)


async def test_at_the_same_rate_a_clearly_shorter_ttft_wins() -> None:
    rate = Grid().rate(8)
    slow, fast = await outcome({"a": 1}, rate), await outcome({"a": 2}, rate * 1.08)
    assert slow.capacity is not None and fast.capacity is not None
    assert slow.capacity.rung == fast.capacity.rung
    assert not is_better(fast, slow), "3.7 % shorter is noise"
    faster = await MadeUp(lambda _: rate * 1.08, headroom=1.0).evaluate({"a": 3}, None)
    assert not is_better(slow, faster)


async def test_where_nothing_meets_the_slo_more_throughput_wins() -> None:
    slow, fast = await outcome({"a": 1}, 1e-6, 10e6), await outcome({"a": 2}, 1e-6, 20e6)
    assert is_better(fast, slow) and not is_better(slow, fast)
    met = await outcome({"a": 3}, 0.5)
    assert is_better(met, fast) and not is_better(fast, met)


def test_a_failure_is_never_better() -> None:
    assert not is_better(Outcome({"a": 1}, None, "no memory"), None)
