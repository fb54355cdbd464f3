"""A timer of the event loop that may be set to an earlier time, on a clock that is passed in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf

MIN_DELAY_S = 0.002


class Alarm:
    """Calls `ring` once, at the earliest time it was set to. `clock`: seconds."""

    def __init__(self, ring: Callable[[], None], clock: Callable[[], float]) -> None:
        self._ring = ring
        self._clock = clock
        self._at = inf
        self._timer: asyncio.TimerHandle | None = None

    def set(self, at: float) -> None:
        """Sees that it rings at that time or earlier; infinity changes nothing."""
        if at >= self._at:
            return
        self.stop()
        self._at = at
        delay_s = max(at - self._clock(), MIN_DELAY_S)
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_time)

    def stop(self) -> None:
        """It does not ring. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._at = inf

    def _on_time(self) -> None:
        self._timer = None
        self._at = inf
        self._ring()
