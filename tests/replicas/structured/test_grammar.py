"""Masks against the slow obvious check, guesses, failures, numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.grammars.source import GrammarSource
from replicas.engine.structured.grammar import (
    BURST_S,
    GUESS_BURST_S,
    GUESS_PER_TOKEN_S,
    MAX_GUESSABLE_S,
    Grammar,
)
from replicas.engine.structured.numbers import MAX_DIGITS, DigitTokens, NumberEnd
from tests.replicas.structured.kit import EOS, EPSILON, WORDS, Regex, allowed_by, grammar_of, ids, regex


def regexes() -> st.SearchStrategy[Regex]:
    letters = st.sampled_from("abc").map(lambda char: Regex("char", (char,)))
    return st.recursive(
        letters | st.just(EPSILON),
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda parts: Regex("then", parts)),
            st.tuples(inner, inner).map(lambda parts: Regex("either", parts)),
            inner.map(lambda part: Regex("star", (part,))),
        ),
        max_leaves=6,
    )


def is_certain(possible: set[int]) -> bool:
    """Whether all ways to go on begin with the same character."""
    return EOS not in possible and len({WORDS[token_id][0] for token_id in possible}) == 1


@settings(max_examples=50, deadline=None)
@given(regexes(), st.data())
def test_a_mask_allows_exactly_the_tokens_after_which_a_match_is_possible(wanted: Regex, data: st.DataObject) -> None:
    """But where the next characters are certain: then the tokenizer's own way of writing them is enough."""
    grammar, text = grammar_of(regex(str(wanted))), ""
    for _ in range(6):
        allowed, possible = ids(grammar.allowed()), allowed_by(wanted, text)
        if is_certain(possible):
            assert allowed and allowed <= possible, f"{wanted} behind {text!r}"
        else:
            assert allowed == possible, f"{wanted} behind {text!r}"
        words = sorted(allowed - {EOS})
        if not words:
            return
        token_id = data.draw(st.sampled_from(words))
        assert grammar.advance(token_id)
        text += WORDS[token_id]


@settings(max_examples=30, deadline=None)
@given(regexes(), st.lists(st.integers(0, EOS - 1), min_size=1, max_size=4))
def test_a_mask_behind_guesses_is_the_mask_they_would_lead_to(wanted: Regex, path: list[int]) -> None:
    grammar, walked = grammar_of(regex(str(wanted))), grammar_of(regex(str(wanted)))
    before = grammar.allowed()
    guessed = grammar.allowed(path)
    if all(token_id in ids(walked.allowed()) and walked.advance(token_id) for token_id in path):
        assert guessed == walked.allowed()
    else:
        assert guessed is None
    assert grammar.allowed() == before and grammar.fault is None, "a guess leaves nothing behind"


def test_a_grammar_is_complete_when_nothing_but_the_end_can_follow() -> None:
    grammar = grammar_of(regex("ab?"))
    assert grammar.advance(WORDS.index("a")) and not grammar.complete
    assert EOS in ids(grammar.allowed())
    assert grammar.advance(WORDS.index("b")) and grammar.complete


def test_a_token_that_is_not_allowed_is_a_fault_for_good() -> None:
    grammar = grammar_of(regex("a+"))
    assert not grammar.advance(WORDS.index("b"))
    assert grammar.fault is not None and grammar.fault.param == "structured_outputs"
    assert grammar.allowed() is None and not grammar.advance(WORDS.index("a")) and not grammar.complete


class Slow:
    """A CPU clock by which everything between two looks takes `step_s`."""

    def __init__(self, step_s: float) -> None:
        self.now = 0.0
        self.step_s = step_s

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


def num_tokens_until_fault(grammar: Grammar, limit: int = 2000) -> int:
    for i in range(limit):
        grammar.allowed()
        if not grammar.advance(0):
            assert grammar.fault is not None and grammar.fault.code == "grammar_too_complex"
            return i
    return limit


def test_a_grammar_that_takes_long_to_follow_is_given_up() -> None:
    slow = num_tokens_until_fault(grammar_of(regex("a*"), cpu_s=Slow(0.02)))
    assert slow == pytest.approx(BURST_S / 0.04, rel=0.1)
    assert num_tokens_until_fault(grammar_of(regex("a*"), cpu_s=Slow(0.0002))) == 2000


def test_masks_behind_guesses_are_not_charged_to_the_answer_but_end_the_guessing() -> None:
    clock = Slow(0.0)
    grammar = grammar_of(regex("a*"), cpu_s=clock)
    num_guessed = 0
    for _ in range(200):
        clock.step_s = 0.0
        assert grammar.allowed() is not None
        if grammar.bears_guesses:
            clock.step_s = 0.005
            for length in range(1, 5):
                assert grammar.allowed([0] * length) is not None, "what was planned is made"
            clock.step_s = 0.0
            num_guessed += 1
        assert grammar.advance(0) and grammar.fault is None
    assert num_guessed == pytest.approx((GUESS_BURST_S + 200 * GUESS_PER_TOKEN_S) / 0.02, abs=2)


def test_a_slow_answer_ends_where_it_would_end_without_guesses() -> None:
    def num_tokens(guesses: int) -> int:
        clock = Slow(0.02)
        grammar = grammar_of(regex("a*"), cpu_s=clock)
        for i in range(100):
            for length in range(1 + guesses):
                grammar.allowed([0] * length)
            if not grammar.advance(0):
                return i
        return 100

    assert num_tokens(0) == num_tokens(8) < 100


def test_a_grammar_whose_last_mask_was_dear_bears_no_guesses() -> None:
    clock = Slow(0.0)
    grammar = grammar_of(regex("a*"), cpu_s=clock)
    for mask_s, bears in ((0.0, True), (1.5 * MAX_GUESSABLE_S, False), (0.5 * MAX_GUESSABLE_S, True)):
        clock.step_s = mask_s
        grammar.allowed()
        assert grammar.bears_guesses == bears


# Numbers without end.

BYTES = [bytes([i]) for i in range(256)]
DIGITS = DigitTokens.of(256, lambda token_id: BYTES[token_id])


def number_end(text: bytes) -> NumberEnd:
    assert DIGITS is not None
    numbers = NumberEnd(DIGITS)
    for byte in text:
        numbers.advance(byte)
    return numbers


def mask(*chars: str) -> bytes:
    return sum(1 << ord(char) for char in "".join(chars)).to_bytes(32, "little")


def test_a_number_that_never_ends_is_ended_where_something_else_may_follow() -> None:
    enough = b"-" + b"1" * MAX_DIGITS
    assert number_end(enough).without_digits(mask("0123456789,}")) == mask(",}")
    assert number_end(enough[:-1]).without_digits(mask("0123456789,}")) == mask("0123456789,}")
    assert number_end(enough).without_digits(mask("0123456789")) == mask("0123456789"), "nothing else may follow"
    assert number_end(enough + b".").without_digits(mask("0123456789")) == mask("0123456789")
    assert number_end(enough[:-1]).without_digits(mask("12,"), path=[ord("5")]) == mask(",")
    assert number_end(enough).without_digits(mask("12,"), path=[ord("."), ord("1")]) == mask("12,")


def test_digits_in_a_string_are_left_alone() -> None:
    assert number_end(b'"' + b"1" * 99).without_digits(mask("0123456789x")) == mask("0123456789x")


def test_a_vocabulary_without_letters_bounds_no_numbers() -> None:
    assert DigitTokens.of(11, lambda token_id: b"%d" % token_id) is None


def test_only_json_has_its_numbers_bounded() -> None:
    assert GrammarSource(kind="json", text="{}").has_json
    assert not regex("[0-9]+").has_json
