"""Adapters that this ingress asked a replica for since it last spoke: on their way there, though it has not said so."""

from __future__ import annotations

from collections.abc import Callable

from replicas.contract import EngineStats

MIN_PUSHES = 2
MIN_ASKED_S = 0.01
"""After this many pushes and seconds the replica has heard of it: what it says counts (see `gateway.slot`)."""


class AskedAdapters:
    """For one replica. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._asked: dict[str, tuple[float, int]] = {}  # adapter → when, after how many pushes
        self._resident: tuple[str, ...] = ()
        self._set: frozenset[str] = frozenset()

    def ask(self, adapter_id: str, num_pushes: int) -> None:
        """A request for it, or word that one will come, was sent."""
        if adapter_id not in self._set:
            self._asked.setdefault(adapter_id, (self._clock(), num_pushes))

    def heard(self, stats: EngineStats, num_pushes: int) -> None:
        """The replica has spoken."""
        if not self._asked:
            return
        known = {*stats.adapters, *(name for name, _ in stats.loading)}
        old_enough = self._clock() - MIN_ASKED_S
        self._asked = {
            name: (at, before)
            for name, (at, before) in self._asked.items()
            if name not in known and (before + MIN_PUSHES > num_pushes or at > old_enough)
        }

    def clear(self) -> None:
        """Nothing that was asked counts any more."""
        self._asked.clear()

    def resident(self, stats: EngineStats) -> frozenset[str]:
        """The replica's resident adapters as a set, made anew only when they have changed."""
        if stats.adapters != self._resident:
            self._resident = stats.adapters
            self._set = frozenset(stats.adapters)
        return self._set

    def loading(self, stats: EngineStats) -> tuple[tuple[str, float], ...]:
        """What the replica says is loading, and behind it what it was asked for."""
        if not self._asked:
            return stats.loading
        now = self._clock()
        known = {name for name, _ in stats.loading}
        expected_s = stats.adapter_queue_s + stats.adapter_load_s
        asked = [
            (name, max(0.0, expected_s - (now - at)))
            for name, (at, _) in self._asked.items()
            if name not in known and name not in stats.adapters
        ]
        return (*stats.loading, *asked)
