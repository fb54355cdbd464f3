"""Adapters that keep their slots though no request uses them: prefetched ones for a while, pinned ones for good."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from replicas.adapter_slots import AdapterSlots

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HoldLimits:
    """`seconds`: how long a prefetched adapter is held. `spare_ranks`: what those held must leave to all others."""

    seconds: float
    spare_ranks: int = 0


class Holds:
    """Pins on `slots`. `on_free` is called when one has ended. On one event loop."""

    def __init__(self, slots: AdapterSlots, limits: HoldLimits, on_free: Callable[[], None]) -> None:
        self._slots = slots
        self._hold_s = limits.seconds
        self._spare_ranks = limits.spare_ranks
        self._on_free = on_free
        self._refused: set[str] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._kept: set[str] = set()

    @property
    def num_timed(self) -> int:
        return len(self._timers)

    def begin(self, adapter_id: str) -> None:
        """Holds a resident adapter until it is used, for `hold_s` at most."""
        self._slots.pin(adapter_id)
        self._timers[adapter_id] = asyncio.get_running_loop().call_later(self._hold_s, self.end, adapter_id)

    def end(self, adapter_id: str) -> None:
        """Ends a hold of `begin`; no-op when there is none."""
        timer = self._timers.pop(adapter_id, None)
        if timer is not None:
            timer.cancel()
            self._slots.unpin(adapter_id)
            self._on_free()

    def is_kept(self, adapter_id: str) -> bool:
        """Whether it is held for good."""
        return adapter_id in self._kept

    def keep(self, adapter_id: str) -> None:
        """Holds a resident adapter for good; only says why not when the others would be left no slot, or no room for
        one of the largest rank."""
        if adapter_id in self._kept:
            return
        rank = self._slots.rank_of(adapter_id)
        if len(self._kept) < self._slots.num_slots - 1 and self.has_room(rank, self._kept):
            self._slots.pin(adapter_id)
            self._kept.add(adapter_id)
        elif adapter_id not in self._refused:
            self._refused.add(adapter_id)
            log.error(
                "adapter %s is pinned but not kept: of %d slots and ranks of %s, %d and %d are kept, and one slot and "
                "rank %d stay for the others",
                adapter_id,
                self._slots.num_slots,
                self._slots.max_ranks,
                len(self._kept),
                self._sum(self._kept),
                self._spare_ranks,
            )

    def has_room(self, rank: int, held: Iterable[str] | None = None) -> bool:
        """Whether one more of this rank may be held beside the `held` ones (all of them), others having room too."""
        names = {*self._timers, *self._kept} if held is None else held
        return self._sum(names) + rank + self._spare_ranks <= self._slots.max_ranks

    def _sum(self, names: Iterable[str]) -> int:
        return sum(map(self._slots.rank_of, names))

    def release(self, adapter_id: str) -> None:
        """Ends every hold of an adapter."""
        self._refused.discard(adapter_id)
        self.end(adapter_id)
        if adapter_id in self._kept:
            self._kept.remove(adapter_id)
            self._slots.unpin(adapter_id)
            self._on_free()

    def review(self, is_pinned: Callable[[str], bool]) -> None:
        """Lets go of those that need not be kept any more."""
        for adapter_id in [name for name in self._kept if not is_pinned(name)]:
            self.release(adapter_id)

    def close(self) -> None:
        for adapter_id in [*self._timers, *self._kept]:
            self.release(adapter_id)
