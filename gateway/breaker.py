"""Keeps requests away for a while from a replica that failed several of them in a row."""

from __future__ import annotations

from collections.abc import Callable

MAX_FAILURES = 3
BREAKER_S = 2.0
MAX_BREAKER_S = 30.0


class Breaker:
    """closed ─ MAX_FAILURES in a row ─► open ─ time ─► closed, but one more failure opens it again, for longer."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._num_failures = 0
        self._open_s = BREAKER_S
        self._until = 0.0

    @property
    def is_open(self) -> bool:
        return self._clock() < self._until

    def failed(self) -> float | None:
        """Counts a failure; returns for how many seconds it is open now, if this one opened it."""
        self._num_failures += 1
        if self._num_failures < MAX_FAILURES or self.is_open:
            return None
        open_s = self._open_s
        self._until = self._clock() + open_s
        self._open_s = min(2 * open_s, MAX_BREAKER_S)
        return open_s

    def succeeded(self) -> None:
        self._num_failures = 0
        self._open_s = BREAKER_S
