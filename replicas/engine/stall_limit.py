"""How many prompt tokens a step takes beside running answers, so that their next tokens come in time.

What a prompt's token costs differs by more than ten within one prompt: a chunk of a few tokens still reads all weights,
and deep in a context attention costs several times all else. So the number is not reckoned from a mean but steered:
each such step says whether it was too many, and none changes it by much, since machines hiccup. What is too many is
told from steps of as many answers without prompts; where none was seen lately, the next step is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from replicas.engine.sequence import Plan

MIN_TOKENS = 4
"""Prompts get so many tokens a step however short the stall allowed: where a chunk takes that long by itself, one token
would stall answers hardly less, and for many times as long."""

PLAIN_EVERY = 64
"""Steps with prompts after which one without is measured anew."""

_GAIN = 0.5  # of the way to what the last step says, in logarithms
_LARGEST_CUT, _LARGEST_RISE = 0.6, 1.25  # a step
_LEAST_SHARE = 0.05  # of a step's time that prompts have taken in any case
_DECAY = 0.7


@dataclass(slots=True)
class _Plain:
    """Seconds of steps with answers alone, and steps with prompts since the last of them."""

    seconds: float
    age: int = 0


class StallLimit:
    """Steers prompts' tokens a step. `limit_s`: how much longer such a step may take; None = as long as it likes."""

    def __init__(self, limit_s: float | None, max_tokens: int) -> None:
        self._limit_s = limit_s
        self._max_tokens = max_tokens
        self._aim: float | None = None
        self._given: int | None = None  # what the plan that is being executed was allowed
        self._plain: dict[int, _Plain] = {}

    def tokens(self, num_decodes: int, first_guess: Callable[[float], float]) -> int:
        """The most prompt tokens for a step with so many answers; none when their own time is to be measured.
        `first_guess`: tokens that take so many seconds, as far as is known."""
        if self._limit_s is None:
            return self._max_tokens
        plain = self._plain.get(_bucket(num_decodes))
        if plain is None or plain.age >= PLAIN_EVERY:
            return 0
        self._given = int(self._bounded(first_guess(self._limit_s) if self._aim is None else self._aim))
        return self._given

    def observe(self, plan: Plan, elapsed_s: float) -> None:
        """Learns from an executed step."""
        given, self._given = self._given, None
        num_decodes, num_tokens = plan.num_decodes, plan.num_prefill_tokens
        if self._limit_s is None or not num_decodes or elapsed_s <= 0:
            return
        plain = self._plain.get(_bucket(num_decodes))
        if not num_tokens:
            mean = elapsed_s if plain is None else _DECAY * plain.seconds + (1 - _DECAY) * elapsed_s
            self._plain[_bucket(num_decodes)] = _Plain(mean)
        elif given is not None and plain is not None:
            plain.age += 1
            self._steer(given, num_tokens, max(elapsed_s - plain.seconds, _LEAST_SHARE * elapsed_s))

    def _steer(self, given: int, num_tokens: int, took_s: float) -> None:
        """`num_tokens` of `given` tokens took that long."""
        assert self._limit_s is not None
        if took_s <= self._limit_s and num_tokens < given:
            return  # there were no more tokens to compute: it says nothing about more
        change = (self._limit_s / took_s) ** _GAIN
        if self._aim is None:  # a guess may be far off
            self._aim = self._bounded(num_tokens * change**2)
            return
        was = self._aim if num_tokens == given else math.sqrt(self._aim * num_tokens)
        self._aim = self._bounded(was * min(max(change, _LARGEST_CUT), _LARGEST_RISE))

    def _bounded(self, tokens: float) -> float:
        return min(max(tokens, MIN_TOKENS), self._max_tokens)


def _bucket(num_decodes: int) -> int:
    """Numbers of answers within an eighth of each other share their measurements."""
    shift = max(0, num_decodes.bit_length() - 4)
    return num_decodes >> shift << shift
