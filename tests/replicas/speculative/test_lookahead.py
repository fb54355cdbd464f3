"""Lookahead decoding around a model that looks at the last token alone: there every n-gram it finds is right."""

from __future__ import annotations

import random
from array import array

from replicas.engine.drafts import Drafts
from replicas.engine.sequence import Plan, PlanItem, Sampled, Sequence, StepResult
from replicas.engine.speculative.drafter import Wish
from replicas.engine.speculative.lookahead import Lookahead, LookaheadDrafter
from tests.replicas.engine_kit import make_request

SHAPE = Lookahead(window=4, ngram=3, guesses=2)


def say(token_id: int) -> int:
    """What follows: a ring of twenty."""
    return (token_id + 7) % 20


def sequence(tokens: list[int]) -> Sequence:
    return Sequence.from_request(make_request("a", tokens), 0.0)


def tree_of(drafter: LookaheadDrafter, seq: Sequence) -> Drafts:
    return drafter.draft([Wish(seq, SHAPE.max_rows)])["a"].drafts


def step(drafter: LookaheadDrafter, seq: Sequence, max_drafts: int = 99) -> int:
    """One engine step; returns the number of new tokens."""
    tree = tree_of(drafter, seq).cut(max_drafts, 99)
    draws = tuple(say(token_id) for token_id in (seq.tokens[-1], *tree.token_ids))
    said = [Sampled(draws[row]) for row in (0, *tree.accepted(draws))]
    item = PlanItem(seq, seq.num_tokens - 1, len(tree) + 1, True, tree)
    seq.tokens.extend(array("I", [token.token_id for token in said]))
    drafter.observe(Plan((item,)), StepResult((tuple(said),), {}, {"a": draws}))
    return len(said)


def test_the_window_is_a_tree_of_columns_under_the_oldest_round() -> None:
    tree = tree_of(LookaheadDrafter(SHAPE, random.Random(1)), sequence([5, 6, 7]))
    assert tree.parents == (0, 1, 2, 3, 1, 2, 3, 4)
    assert tree.depths == (0, 1, 2, 3, 4, 2, 3, 4, 5)
    assert set(tree.token_ids) <= {5, 6, 7}


def test_ngrams_that_the_window_found_are_checked_and_save_steps() -> None:
    drafter, seq = LookaheadDrafter(SHAPE, random.Random(1)), sequence(list(range(10)))
    lengths = [step(drafter, seq) for _ in range(60)]
    assert all(b == say(a) for a, b in zip(seq.tokens[9:], seq.tokens[10:], strict=False))
    assert sum(lengths[20:]) > 1.8 * 40 and max(lengths) == SHAPE.ngram


def test_a_tree_has_at_most_the_rows_of_its_shape() -> None:
    drafter, seq = LookaheadDrafter(SHAPE, random.Random(2)), sequence([1, 2, 3])
    sizes = []
    for _ in range(40):
        sizes.append(len(tree_of(drafter, seq)))
        step(drafter, seq)
    assert SHAPE.max_rows == 12 and max(sizes) <= 12 and min(sizes) == 8


def test_a_window_that_was_cut_is_left_as_it_was() -> None:
    drafter, seq = LookaheadDrafter(SHAPE, random.Random(2)), sequence([1, 2, 3])
    step(drafter, seq)
    rounds = [list(past) for past in drafter._searches["a"].rounds]
    step(drafter, seq, max_drafts=5)
    assert drafter._searches["a"].rounds == rounds
    drafter.retain(frozenset())
    assert not drafter._searches
