"""LoRA adapters of a simulated replica: the replicas' own slots, with loads that take virtual time.

A request whose adapter is absent waits for it beside the queue; all who want one adapter wait for one load. Loads begin
in the order they were asked for, those of requests before prefetches.
"""

from __future__ import annotations

from math import inf
from typing import Generic, Protocol, TypeVar

from replicas.adapter_counts import LoadTimes
from replicas.adapter_slots import AdapterSlots

REFERENCE_RANK = 8
"""The rank that `load_s` is for; a load takes rank ÷ 8 times as long."""


class AdapterRequest(Protocol):
    """A request as far as slots care."""

    @property
    def adapter(self) -> str | None: ...

    @property
    def adapter_rank(self) -> int: ...


class AdapterUser(Protocol):
    """Who waits for an adapter and then uses it until its answer ends."""

    @property
    def request(self) -> AdapterRequest: ...


U = TypeVar("U", bound=AdapterUser)


class SimAdapters(Generic[U]):
    """`num_slots` slots, at most `max_loads` loads at once, each `load_s` × rank ÷ 8 long."""

    def __init__(self, num_slots: int, max_loads: int, load_s: float) -> None:
        self.slots = AdapterSlots(num_slots)
        self.num_loads = 0
        self._max_loads = max_loads
        self._load_s = load_s
        self._times = LoadTimes()
        self._begun: dict[str, tuple[float, int]] = {}  # adapter → when it is there, rank
        self._wanted: dict[str, int] = {}  # adapter → rank, in the order asked for
        self._early: dict[str, int] = {}
        self._waiters: dict[str, list[U]] = {}

    @property
    def next_at(self) -> float:
        """When the next load is done; infinity without any."""
        return min(at for at, _ in self._begun.values()) if self._begun else inf

    @property
    def num_waiting(self) -> int:
        """Requests whose adapter is not there yet."""
        return sum(map(len, self._waiters.values())) if self._waiters else 0

    @property
    def load_s(self) -> float:
        """Learnt seconds of a load of rank 8; 0 while nothing was loaded."""
        return self._times.estimate_s()

    def ready(self, user: U, now: float) -> bool:
        """Whether the request's adapter is there (then it is kept for it); else it waits, and `advance` returns it."""
        adapter = user.request.adapter
        if adapter is None or not self.slots.num_slots:
            return True
        self.slots.used(adapter, now)
        if self.slots.is_resident(adapter):
            self.slots.pin(adapter)
            return True
        self._waiters.setdefault(adapter, []).append(user)
        rank = self._early.pop(adapter, user.request.adapter_rank)
        if adapter not in self._begun:
            self._wanted.setdefault(adapter, rank)
            self._begin(now)
        return False

    def prefetch(self, adapter: str, rank: int, now: float) -> None:
        """Somebody will want it soon: loaded when nobody waits for another."""
        if not (self.slots.is_resident(adapter) or adapter in self._begun or adapter in self._wanted):
            self._early[adapter] = rank
            self._begin(now)

    def advance(self, now: float) -> list[U]:
        """Ends the loads that are done by now; returns who waited for them."""
        ready: list[U] = []
        for adapter in [adapter for adapter, (at, _) in self._begun.items() if at <= now]:
            _, rank = self._begun.pop(adapter)
            self._times.observe(rank, self._seconds(rank))
            self.slots.loaded(adapter)
            for user in self._waiters.pop(adapter, ()):
                self.slots.pin(adapter)
                ready.append(user)
        self._begin(now)
        return ready

    def release(self, user: U, now: float) -> None:
        """A request that was ready has ended."""
        adapter = user.request.adapter
        if adapter is not None and self.slots.num_slots:
            self.slots.unpin(adapter)
            self._begin(now)

    def under_way(self, now: float) -> tuple[tuple[str, float], ...]:
        """Adapters being loaded or queued for it, with the seconds each has left, as the replica estimates them."""
        if not (self._begun or self._wanted or self._early):
            return ()
        found = [(name, self._left_s(at, rank, now)) for name, (at, rank) in self._begun.items()]
        wait_s = min((s for _, s in found), default=0.0) if len(found) >= self._max_loads else 0.0
        for name, rank in (*self._wanted.items(), *self._early.items()):
            own_s = self._times.estimate_s(rank)
            found.append((name, wait_s + own_s))
            wait_s += own_s / self._max_loads
        return tuple(found)

    def queue_s(self, now: float) -> float:
        """Seconds before a load asked for now could begin."""
        left = [self._left_s(at, rank, now) for at, rank in self._begun.values()]
        wait_s = min(left) if len(left) >= self._max_loads else 0.0
        return wait_s + sum(self._times.estimate_s(rank) for rank in self._wanted.values()) / self._max_loads

    def _begin(self, now: float) -> None:
        while len(self._begun) < self._max_loads and (self._wanted or self._early):
            queue = self._wanted or self._early
            adapter = next(iter(queue))
            if self.slots.claim(adapter) is None:
                return
            rank = queue.pop(adapter)
            self._begun[adapter] = (now + self._seconds(rank), rank)
            self.num_loads += 1

    def _seconds(self, rank: int) -> float:
        return self._load_s * rank / REFERENCE_RANK

    def _left_s(self, at: float, rank: int, now: float) -> float:
        """By the learnt time, which may differ from when it will really be there."""
        began = at - self._seconds(rank)
        return max(0.0, self._times.estimate_s(rank) - (now - began))
