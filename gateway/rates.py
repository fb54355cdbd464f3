"""What the learnt rates of an idle replica are worth: ever less, beside those of its group.

Only work corrects a rate. One that was measured while the replica warmed up, or while others had its CPU, would keep
work away from it, and so would stay. Replicas of a group are alike, so the rates of one that has nothing to do move
towards those of the others that work, until it has learnt something new. One at work is taken at its word.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from statistics import median

from gateway.slot import Slot

RELAX_EVERY_S = 2.0

HALF_LIFE_S = 10.0
"""Idle for so long, a replica's own rates and its group's count alike."""


def relaxed(own: float, peers: Sequence[float], idle_s: float) -> float:
    """A rate after so long without work. Geometric: half as fast and twice as fast are equally far away."""
    known = [rate for rate in peers if rate > 0]
    if own <= 0 or not known:
        return own
    weight: float = 0.5 ** (idle_s / HALF_LIFE_S)
    return float(own**weight * median(known) ** (1 - weight))


def relax(slots: Iterable[tuple[str, Slot]]) -> None:
    """Moves the rates of idle replicas. `slots`: each with the name of its group."""
    groups: dict[tuple[str, str], list[Slot]] = {}
    for group, slot in slots:
        if slot.link is not None:
            groups.setdefault((slot.model_id, group), []).append(slot)
    for alike in groups.values():
        working = [slot.link.stats for slot in alike if slot.link is not None and slot.idle_s < RELAX_EVERY_S]
        prefill, step = [s.prefill_tokens_per_s for s in working], [s.step_time_s for s in working]
        for slot in alike:
            if working and slot.link is not None and slot.idle_s >= RELAX_EVERY_S:
                own = slot.link.stats
                slot.believe(
                    relaxed(own.prefill_tokens_per_s, prefill, slot.idle_s),
                    relaxed(own.step_time_s, step, slot.idle_s),
                )


class Relaxation:
    """`relax`, every `RELAX_EVERY_S` from `start` to `stop`."""

    def __init__(self, slots: Callable[[], Iterable[tuple[str, Slot]]]) -> None:
        self._slots = slots
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Idempotent."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(RELAX_EVERY_S, self._again)

    def stop(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _again(self) -> None:
        self._timer = None
        relax(self._slots())
        self.start()
