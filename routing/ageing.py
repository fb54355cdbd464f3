"""When a waiting prompt is due where short ones go first: what engines order by, and ingresses before them."""

from __future__ import annotations

from routing.waiting import LONG_SHARE, STRETCH

_SCALE_DECAY = 0.99


class PromptScale:
    """The scale of the prompts that come: E[x²]/E[x] of their uncached tokens x, over about the last hundred."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._squares = 0.0

    @property
    def tokens(self) -> float:
        """0 while none has come."""
        return self._squares / self._tokens if self._tokens else 0.0

    def observe(self, num_uncached: int) -> None:
        self._tokens = _SCALE_DECAY * self._tokens + num_uncached
        self._squares = _SCALE_DECAY * self._squares + num_uncached**2


def handicap_s(num_uncached: int, scale_tokens: float, tokens_per_s: float) -> float:
    """How long after its arrival a prompt is due: `STRETCH` times its prefill.

    What is longer than `LONG_SHARE` of the scale counts as just that long; a scale of 0 is not known yet.
    """
    counted = min(num_uncached, LONG_SHARE * scale_tokens) if scale_tokens > 0 else num_uncached
    return STRETCH * counted / tokens_per_s


class Dues:
    """When prompts that arrive one after another are due, by the scale they themselves make."""

    def __init__(self) -> None:
        self._scale = PromptScale()

    def due(self, at: float, num_uncached: int, tokens_per_s: float) -> float:
        """Of the next one, that arrives `at` that time (seconds) where prompts are computed at that rate."""
        self._scale.observe(num_uncached)
        return at + handicap_s(num_uncached, self._scale.tokens, tokens_per_s)
