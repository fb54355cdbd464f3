"""Counts in which the past fades: what half a life ago counted one counts a half. Time is passed in, in seconds."""

from __future__ import annotations

from heapq import nlargest

_REBASE_HALF_LIVES = 500.0
"""Weights grow instead of old ones shrinking; long before a float overflows (2^1024) all are scaled back."""


class DecayedCounts:
    """Amounts by key, halved every `half_life_s`; beyond `max_keys` the smallest half is forgotten.

    The order of two keys changes only by `add`, so `weight` can be compared without knowing the time.
    (Exponentially decayed counters; as cache priorities: LRFU, Lee et al. 2001.)
    """

    def __init__(self, half_life_s: float, max_keys: int = 8192) -> None:
        assert half_life_s > 0 and max_keys > 1, f"{half_life_s=} {max_keys=}"
        self._half_life_s = half_life_s
        self._max_keys = max_keys
        self._epoch: float | None = None
        self._weights: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._weights)

    def add(self, key: str, amount: float, now: float) -> None:
        """Counts `amount` more for `key`."""
        added = amount * self._scale(now)
        weights = self._weights
        weights[key] = weights.get(key, 0.0) + added
        if len(weights) > self._max_keys:
            self._weights = dict(nlargest(self._max_keys // 2, weights.items(), key=lambda item: item[1]))

    def weight(self, key: str) -> float:
        """What orders keys by their amounts; 0 for one never counted or forgotten."""
        return self._weights.get(key, 0.0)

    def amount(self, key: str, now: float) -> float:
        """What is left of all that was counted for `key`."""
        scale = self._scale(now)
        return self._weights.get(key, 0.0) / scale

    def shares(self) -> dict[str, float]:
        """Every key's part of the whole, summing to 1; empty when nothing was counted."""
        total = sum(self._weights.values())
        return {key: weight / total for key, weight in self._weights.items()} if total > 0 else {}

    def _scale(self, now: float) -> float:
        """The weight of one counted now."""
        if self._epoch is None:
            self._epoch = now
        half_lives = (now - self._epoch) / self._half_life_s
        if half_lives > _REBASE_HALF_LIVES:
            shrink = 2.0**-half_lives if half_lives < 1000 else 0.0
            self._weights = {key: shrunk for key, weight in self._weights.items() if (shrunk := weight * shrink) > 0}
            self._epoch, half_lives = now, 0.0
        return float(2.0**half_lives)
