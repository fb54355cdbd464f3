"""Counts in which the past fades."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.decay import DecayedCounts


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.1, 10), st.floats(0, 5000)), max_size=60))
@settings(max_examples=100, deadline=None)
def test_amounts_equal_the_sum_of_all_that_was_counted_each_faded_by_its_age(
    adds: list[tuple[str, float, float]],
) -> None:
    counts, now, history = DecayedCounts(10.0), 100.0, []
    for key, amount, later_s in adds:
        now += later_s
        counts.add(key, amount, now)
        history.append((key, amount, now))
    for key in "abc":
        expected = math.fsum(amount * 2 ** -((now - at) / 10.0) for name, amount, at in history if name == key)
        assert counts.amount(key, now) == pytest.approx(expected, rel=1e-6, abs=1e-90)


def test_shares_sum_to_one_and_order_as_weights_do() -> None:
    counts = DecayedCounts(60.0)
    for name, amount in (("a", 1.0), ("b", 3.0), ("c", 4.0)):
        counts.add(name, amount, 5.0)
    assert counts.shares() == pytest.approx({"a": 0.125, "b": 0.375, "c": 0.5})
    assert counts.weight("a") < counts.weight("b") < counts.weight("c")
    assert counts.weight("unknown") == 0.0 and DecayedCounts(1.0).shares() == {}


def test_what_was_hot_long_ago_comes_after_what_is_used_now() -> None:
    counts = DecayedCounts(10.0)
    for _ in range(100):
        counts.add("once", 1.0, 0.0)
    counts.add("now", 1.0, 100.0)
    assert counts.weight("now") > counts.weight("once")


def test_keys_are_bounded_and_the_smallest_are_forgotten() -> None:
    counts = DecayedCounts(60.0, max_keys=10)
    for i in range(1000):
        counts.add(f"k{i}", float(i), 0.0)
    assert len(counts) <= 10 and counts.weight("k999") > 0 and counts.weight("k1") == 0


def test_years_of_silence_neither_overflow_nor_divide_by_zero() -> None:
    counts = DecayedCounts(1.0)
    counts.add("a", 1.0, 0.0)
    counts.add("b", 1.0, 1e9)
    assert counts.shares() == {"b": 1.0} and counts.amount("a", 1e9) == 0.0
