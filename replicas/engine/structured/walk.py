"""Ways through a compiled grammar. No torch here.

The library's lexer makes its states as they are needed, and all copies of a matcher share them: what one answer has
paid for serves the others. They are bounded (`LIMITS.max_lexer_states`), and strings with a `maxLength` alone fill that
in a few answers. Then a walk begins anew in a lexer of its own, along the tokens that it has taken, and answers that
come later share another.
"""

from __future__ import annotations

from collections.abc import Sequence

import llguidance

from configs.grammars.translate import LIMITS, refusal


class Compiled:
    """A grammar compiled for a tokenizer, its first mask known: that is the dearest by far, up to 30 ms. Raises
    GrammarError. `full`: its lexer takes no more states; for new answers another is needed."""

    def __init__(self, tokenizer: llguidance.LLTokenizer, grammar: str) -> None:
        self.full = False
        self._tokenizer = tokenizer
        self._grammar = grammar
        self._matcher = self.fresh()
        if not self._matcher.is_error():
            self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise refusal(self._matcher.get_error())

    def copy(self) -> llguidance.LLMatcher:
        """At the beginning of the grammar, with a share in the lexer. Microseconds."""
        return self._matcher.deep_copy()

    def fresh(self) -> llguidance.LLMatcher:
        """At the beginning of the grammar, with a lexer of its own. About a millisecond."""
        return llguidance.LLMatcher(self._tokenizer, self._grammar, log_level=0, limits=LIMITS)


class Walk:
    """One answer's."""

    __slots__ = ("_compiled", "_matcher", "_tokens")

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled
        self._matcher = compiled.copy()
        self._tokens: list[int] = []

    @property
    def complete(self) -> bool:
        """Nothing more can follow but end of sequence."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """Why there is no mask, or a token was not taken."""
        return self._matcher.get_error() or "a token was drawn that it does not allow"

    def mask(self, path: Sequence[int] = ()) -> bytes | None:
        """What may follow the tokens taken and `path`, one bit a token; None when it cannot be found out, or the path
        is not allowed itself. Behind a path on a copy: an error, unlike a step, cannot be taken back."""
        matcher = self._matcher.deep_copy() if path else self._matcher
        mask = _mask_behind(matcher, path)
        if mask is None and self._begin_anew(matcher):
            mask = _mask_behind(self._matcher.deep_copy() if path else self._matcher, path)
        return mask

    def take(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens could be taken."""
        taken = self._matcher.try_consume_tokens(list(token_ids))
        if taken < len(token_ids) and self._begin_anew(self._matcher):
            taken = self._matcher.try_consume_tokens(list(token_ids))
        self._tokens += token_ids[:taken]
        return taken

    def _begin_anew(self, failed: llguidance.LLMatcher) -> bool:
        """Whether it was the lexer that failed, and this walk has another now."""
        if "lexer error" not in failed.get_error():
            return False
        self._compiled.full = True
        fresh = self._compiled.fresh()
        if fresh.try_consume_tokens(self._tokens) < len(self._tokens):
            return False
        self._matcher = fresh
        return True


def _mask_behind(matcher: llguidance.LLMatcher, path: Sequence[int]) -> bytes | None:
    if path and matcher.try_consume_tokens(list(path)) < len(path):
        return None
    mask = matcher.compute_bitmask()
    return None if matcher.is_error() else mask
