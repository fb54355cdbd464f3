"""Prompt lookup against the slow, obvious search."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.engine.sequence import Sequence
from replicas.engine.speculative import ngram
from replicas.engine.speculative.drafter import Guess, Wish
from replicas.engine.speculative.ngram import NgramDrafter
from tests.replicas.engine_kit import make_request


def sequence(tokens: list[int], name: str = "a") -> Sequence:
    return Sequence.from_request(make_request(name, tokens), 0.0)


def guess(drafter: NgramDrafter, seq: Sequence, count: int = 4) -> Guess | None:
    return drafter.draft([Wish(seq, count)]).get(seq.request_id)


def longest_match(tokens: list[int], least: int, most: int) -> tuple[int, int]:
    """(length, end) of the latest of the longest earlier places of the last tokens; (0, 0) when there is none."""
    found = (0, 0)
    for end in range(least, len(tokens)):
        length = next((n for n in range(min(most, end), 0, -1) if tokens[end - n : end] == tokens[-n:]), 0)
        if length >= least:
            found = max(found, (length, end))
    return found


def test_what_followed_before_is_guessed_again() -> None:
    found = guess(NgramDrafter(2, 4), sequence([1, 2, 3, 4, 5, 6, 9, 2, 3]))
    assert found is not None and found.drafts.token_ids == (4, 5, 6, 9) and found.drafts.is_chain
    assert found.trust == 2


def test_a_longer_match_goes_before_a_later_one() -> None:
    found = guess(NgramDrafter(2, 4), sequence([1, 2, 3, 7, 0, 2, 3, 8, 1, 2, 3]), 1)
    assert found is not None and found.drafts.token_ids == (7,) and found.trust == 3


def test_repetition_goes_on_in_circles() -> None:
    found = guess(NgramDrafter(2, 8), sequence([5, 1, 2, 3, 1, 2, 3]), 7)
    assert found is not None and found.drafts.token_ids == (1, 2, 3, 1, 2, 3, 1)


@pytest.mark.parametrize("tokens", [[1], [1, 2], [1, 2, 3, 4], [4, 4]])
def test_without_an_earlier_place_nothing_is_guessed(tokens: list[int]) -> None:
    assert guess(NgramDrafter(2, 3), sequence(tokens)) is None


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=6),
    st.integers(1, 3),
)
def test_the_index_finds_what_the_obvious_search_finds(said: list[int], more: list[list[int]], least: int) -> None:
    """Answers grow by several tokens at a time; few enough places that none is given up."""
    drafter, seq = NgramDrafter(least, 6), sequence(said)
    for part in ([], *more):
        seq.tokens.extend(part)
        length, end = longest_match(list(seq.tokens), least, 6)
        found = guess(drafter, seq, 3)
        places = sum(seq.tokens[i : i + least] == seq.tokens[-least:] for i in range(len(seq.tokens) - least))
        if places > 8:
            continue
        if not length:
            assert found is None
            continue
        assert found is not None and found.trust == length
        period = len(seq.tokens) - end
        assert found.drafts.token_ids == tuple(seq.tokens[end + i % period] for i in range(3))


def test_what_is_held_for_requests_that_ended_goes() -> None:
    drafter = NgramDrafter(1, 2)
    guess(drafter, sequence([1, 2, 1], "a"))
    guess(drafter, sequence([1, 2, 1], "b"))
    drafter.retain(frozenset({"b"}))
    assert set(drafter._indices) == {"b"}


def test_an_empty_ngram_is_refused() -> None:
    for least, most in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match="min_ngram"):
            NgramDrafter(least, most)


def test_ngrams_with_equal_hashes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "_hash", lambda tokens, end, length: 7)
    drafter, seq = NgramDrafter(2, 4), sequence([0, 0])
    guess(drafter, seq)
    seq.tokens.extend(array("I", [1, 2, 9, 1, 3, 1, 2]))
    found = guess(drafter, seq)
    assert found is not None and found.drafts.token_ids == (9, 1, 3, 1)


def test_a_shorter_request_of_the_same_name_is_another() -> None:
    drafter = NgramDrafter(2, 8)
    assert guess(drafter, sequence([1, 2, 3, 4, 1, 2, 3, 4])) is not None
    shorter = sequence([1, 2, 3, 4])
    assert guess(drafter, shorter) is None
    for token_id in (1, 2, 3, 4):
        shorter.tokens.append(token_id)
        found = guess(drafter, shorter)
    assert found is not None and found.drafts.token_ids == (1, 2, 3, 4) and found.trust == 4


def test_what_does_not_run_is_forgotten_however_many_others_do() -> None:
    drafter = NgramDrafter(2, 8)
    assert guess(drafter, sequence([1, 2, 1, 2])) is not None
    drafter.retain(frozenset({"b", "c"}))
    found = guess(drafter, sequence([3, 4, 5, 3, 4]))
    assert found is not None and found.drafts.token_ids == (5, 3, 4, 5), "no index of the one before"
