"""An end to numbers that never end.

JSON bounds neither the digits of a number nor white space, and a small model that has begun to repeat a digit goes on
until its tokens are used up. White space is bounded by the grammar (`GrammarSource.whitespace`); the digits of a number
are bounded here, as long as something else may follow. Digits in strings are nobody's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_DIGITS = 32
"""In a row. 2^64 has 20, a double that is written exactly enough 17."""


@dataclass(frozen=True, slots=True)
class DigitTokens:
    """A vocabulary's tokens of digits alone, how many they have; those that begin with one, and one that no number has
    but every string may have (bits as in `Grammar.allowed`)."""

    num_digits: dict[int, int]
    beginning: int
    letter: int

    @classmethod
    def of(cls, vocab_size: int, spell: Callable[[int], bytes]) -> DigitTokens | None:
        """`spell` gives a token's bytes; None for a vocabulary without the letter that tells strings from numbers."""
        num_digits, beginning, letter = {}, 0, None
        for token_id in range(vocab_size):
            text = spell(token_id)
            if text[:1].isdigit():
                beginning |= 1 << token_id
                if text.isdigit():
                    num_digits[token_id] = len(text)
            elif text == b"x":
                letter = 1 << token_id
        return None if letter is None else cls(num_digits, beginning, letter)


class NumberEnd:
    """Follows one sequence."""

    __slots__ = ("_run", "_tokens")

    def __init__(self, tokens: DigitTokens) -> None:
        self._tokens = tokens
        self._run = 0

    def advance(self, token_id: int) -> None:
        self._run = self._after(self._run, token_id)

    def without_digits(self, mask: bytes, path: Sequence[int] = ()) -> bytes:
        """The mask of what may follow the tokens taken in and `path`, without more digits for a number that has had
        enough."""
        run = self._run
        for token_id in path:
            run = self._after(run, token_id)
        if run < MAX_DIGITS:
            return mask
        bits = int.from_bytes(mask, "little")
        others = bits & ~self._tokens.beginning
        return mask if bits & self._tokens.letter or not others else others.to_bytes(len(mask), "little")

    def _after(self, run: int, token_id: int) -> int:
        num_digits = self._tokens.num_digits.get(token_id)
        return 0 if num_digits is None else run + num_digits
