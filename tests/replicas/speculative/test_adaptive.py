"""How many guesses are worth while: the choice against trying every number, and against a clock."""

from __future__ import annotations

import random
from itertools import product

import pytest

from replicas.engine.speculative.adaptive import (
    MIN_GAIN,
    Acceptance,
    Costs,
    Offer,
    best_lengths,
    expected_tokens,
)


def speed(offers: list[Offer], lengths: dict[str, int], per_draft_s: float) -> float:
    """Tokens per second, the plain step taking one."""
    tokens = sum(expected_tokens(offer.acceptance, lengths.get(offer.request_id, 0)) for offer in offers)
    return tokens / (1.0 + per_draft_s * sum(lengths.values()))


def test_the_expected_tokens_are_those_of_the_paper() -> None:
    for a, k in product((0.3, 0.8, 0.95), (1, 3, 8)):
        assert expected_tokens(a, k) == pytest.approx((1 - a ** (k + 1)) / (1 - a))


def test_the_lengths_chosen_are_the_best_of_all() -> None:
    rng = random.Random(4)
    for _ in range(150):
        offers = [Offer(f"r{i}", 4, rng.uniform(0.05, 0.98)) for i in range(rng.randint(1, 3))]
        per_draft_s = rng.uniform(0.01, 0.6)
        tried = [
            dict(zip(["r0", "r1", "r2"], choice, strict=False)) for choice in product(range(5), repeat=len(offers))
        ]
        best = max(speed(offers, lengths, per_draft_s) for lengths in tried)
        chosen = dict(best_lengths(offers, len(offers), 1.0, per_draft_s))
        if best < MIN_GAIN * len(offers):
            assert chosen == {}
        else:
            assert speed(offers, chosen, per_draft_s) == pytest.approx(best)


def test_full_batches_are_given_fewer_guesses() -> None:
    """Plain steps get slower less than in proportion, so a guess weighs more the more sequences share the step."""
    lengths = []
    for num_seqs, plain_s in ((1, 1.0), (8, 1.6), (32, 4.0), (128, 13.0)):
        offers = [Offer(f"r{i}", 8, 0.7) for i in range(num_seqs)]
        lengths.append(max(best_lengths(offers, num_seqs, plain_s, 0.1).values(), default=0))
    assert lengths[0] >= 4 and lengths == sorted(lengths, reverse=True) and lengths[-1] == 0


def test_acceptance_is_learnt_by_request_and_kind_and_forgotten_with_the_request() -> None:
    acceptance = Acceptance()
    assert 0.5 < acceptance.estimate("a", 2) < 0.7
    for _ in range(30):
        acceptance.observe("a", 2, 4, 4)
        acceptance.observe("b", 2, 1, 0)
        acceptance.observe("b", 5, 1, 0)
    assert acceptance.estimate("a", 2) > 0.9 and acceptance.estimate("b", 2) < 0.4
    assert acceptance.estimate("new", 2) > acceptance.estimate("new", 5), "the kind of guess tells"
    for _ in range(12):
        acceptance.observe("a", 2, 1, 0)
    assert acceptance.estimate("a", 2) < 0.4, "what a request says may change in the middle"
    acceptance.retain(frozenset("b"))
    assert acceptance.estimate("a", 2) == acceptance.estimate("new", 2)


def test_costs_are_medians_by_number_of_sequences() -> None:
    costs = Costs()
    assert costs.plain_s(4) is None and costs.wants_plain(4)
    for elapsed_s in (1.0, 1.0, 9.0):
        costs.observe(4, 0, elapsed_s)
    assert costs.plain_s(4) == 1.0 and costs.plain_s(5) is None and not costs.wants_plain(4)
    assert 0 < costs.per_draft_s(4) < 0.5, "a guess before anything was measured"
    costs.observe(4, 10, 1.8)
    costs.observe(4, 5, 7.0)
    costs.observe(4, 20, 2.6)
    assert costs.per_draft_s(4) == pytest.approx(0.08)
    for _ in range(64):
        costs.observe(4, 10, 1.8)
    assert costs.wants_plain(4), "machines change"
    costs.observe(4, 0, 2.0)
    assert not costs.wants_plain(4)


def test_a_guess_that_seems_to_cost_nothing_costs_no_less() -> None:
    costs = Costs()
    for elapsed_s in (1.0, 1.0):
        costs.observe(1, 0, elapsed_s)
    costs.observe(1, 3, 0.7)
    assert costs.per_draft_s(1) == 0.0
