"""A job's place at a replica: kept for a moment before it is sent, then held by an attempt until that ends."""

from __future__ import annotations

from typing import Protocol

from gateway.slot import DeltaSource, Sent, Slot


class SlotKeeper(Protocol):
    """Who hears what becomes of places (`gateway.fleet.Fleet`)."""

    def failed(self, slot: Slot) -> None:
        """The replica could not do it, for a reason of its own."""
        ...

    def left(self, slot: Slot) -> None:
        """One attempt there has ended."""
        ...

    def refresh(self, slot: Slot) -> None:
        """What the slot has room for may be something else now."""
        ...


class Reserved:
    """A place that is counted as taken until `close`; the attempt that comes has its own (`gateway.ticket`)."""

    __slots__ = ("_keeper", "_sent", "_slot")

    def __init__(self, keeper: SlotKeeper, slot: Slot, num_uncached: int) -> None:
        self._keeper = keeper
        self._slot = slot
        self._sent = slot.expect(num_uncached)

    def close(self) -> None:
        """Counts no more. Idempotent."""
        if self._sent.counts:
            self._slot.arrived(self._sent)
            self._keeper.refresh(self._slot)


class Placement:
    """One attempt at one replica: the deltas, and its place there until `close`."""

    __slots__ = ("_closed", "_keeper", "_sent", "replica_id", "slot", "source")

    def __init__(self, keeper: SlotKeeper, slot: Slot, opened: tuple[DeltaSource, Sent]) -> None:
        """For `Fleet.place` only."""
        self.slot = slot
        self.replica_id = slot.replica_id
        self.source, self._sent = opened
        self._keeper = keeper
        self._closed = False

    def answered(self) -> None:
        """Its first delta came: the replica has taken it, and works."""
        self.slot.arrived(self._sent)
        self.slot.breaker.succeeded()

    def failed(self) -> None:
        """The replica could not do it, for a reason of its own."""
        self._keeper.failed(self.slot)

    def close(self) -> None:
        """Ends it, at the replica too if it runs on. Idempotent."""
        if not self._closed:
            self._closed = True
            self.source.cancel()
            self.slot.arrived(self._sent)
            self._keeper.left(self.slot)
