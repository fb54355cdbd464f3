"""Telling a step that will never end from one that only gets little of a busy machine.

A stalled thread is blocked (its CPU clock stands still) or runs away (it has burnt more CPU than the limit). A starved
one is neither: its CPU clock moves, slowly; it gets `STARVED_FACTOR` times the limit, because declaring it dead would
start a replacement on the very machine that is too busy already.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

MIN_STALL_S = 5.0
STALL_FACTOR = 5.0
STARVED_FACTOR = 10.0
UNKNOWN_STEP_S = 6.0
"""What a full step may take before any has been seen: 512 prompt tokens of a large model on one slow core."""
_STANDS_STILL_S = 0.005


class StallDetector:
    """Watches one thread. `cpu_s` reads the thread's CPU clock; where there is none, only wall time counts."""

    def __init__(self, cpu_s: Callable[[], float]) -> None:
        self._cpu_s = cpu_s
        self._last_look_s = 0.0
        self._at_progress_s = 0.0
        self._progress_at = -1.0

    def look(self) -> None:
        """Called every second or so: what the CPU clock has gained by the next question is what runs now."""
        self._last_look_s = self._cpu_s()

    def stalled(self, now: float, progress_at: float, predicted_step_s: float) -> bool:
        """Whether a thread with work, whose last step ended at `progress_at`, will not make progress any more."""
        cpu_s = self._cpu_s()
        if progress_at != self._progress_at:
            self._progress_at, self._at_progress_s = progress_at, cpu_s
        waited_s = now - progress_at
        limit_s = max(MIN_STALL_S, STALL_FACTOR * (predicted_step_s or UNKNOWN_STEP_S))
        if waited_s <= limit_s:
            return False
        blocked = cpu_s - self._last_look_s < _STANDS_STILL_S
        ran_away = cpu_s - self._at_progress_s > limit_s
        return blocked or ran_away or waited_s > STARVED_FACTOR * limit_s


def thread_cpu_s(thread: threading.Thread | None) -> float:
    """CPU seconds of a live thread; 0 where the platform does not tell."""
    if thread is None or thread.ident is None or not thread.is_alive() or not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
