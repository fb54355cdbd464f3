"""Where each adapter should live, as this ingress sees demand: `routing.placement` fed with what was placed.

Made anew every `PLACE_EVERY_S` while there is demand, beside requests: a decision only looks up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from routing.decay import DecayedCounts
from routing.placement import Homes, Rendezvous, place
from routing.types import ReplicaState, RouteRequest

PLACE_EVERY_S = 1.0

DEMAND_HALF_LIFE_S = 120.0
"""Shorter, and noise moves adapters; longer, and one that becomes hot waits for its second home."""

ANSWER_TOKENS = 64
"""What an answer counts for beside its uncached prompt tokens."""

NO_ADAPTER = ""
"""The base model's own demand, beside names that are never empty."""


@dataclass(slots=True)
class _Line:
    """One model's demand and what came of it."""

    demand: DecayedCounts = field(default_factory=lambda: DecayedCounts(DEMAND_HALF_LIFE_S))
    rendezvous: Rendezvous = field(default_factory=lambda: Rendezvous(()))
    homes: Homes = field(default_factory=dict)


class AdapterHomes:
    """For one ingress. `states(model_id)`: its connected replicas. `clock`: monotonic seconds."""

    def __init__(self, states: Callable[[str], tuple[ReplicaState, ...]], clock: Callable[[], float]) -> None:
        self._states = states
        self._clock = clock
        self._lines: dict[str, _Line] = {}
        self._timer: asyncio.TimerHandle | None = None

    def placed(self, request: RouteRequest, num_uncached: int) -> None:
        """Counts a request that was sent to a replica, and sees that all are placed anew soon."""
        self.count(request, num_uncached)
        if self._timer is None and request.adapter is not None:
            self._timer = asyncio.get_running_loop().call_later(PLACE_EVERY_S, self._on_timer)

    def count(self, request: RouteRequest, num_uncached: int) -> None:
        """Counts a request that was sent to a replica. Who has no event loop calls this, and `refresh` himself."""
        line = self._lines.get(request.model)
        if line is None:
            if request.adapter is None:  # no adapter was ever asked for: nothing to place
                return
            line = self._lines[request.model] = _Line()
        line.demand.add(request.adapter or NO_ADAPTER, num_uncached + ANSWER_TOKENS, self._clock())

    def of(self, request: RouteRequest) -> tuple[str, ...]:
        """The homes of the request's adapter, the best first; empty without an adapter or a replica.

        One that was not placed yet goes where it likes best among those with a slot to spare.
        """
        if request.adapter is None:
            return ()
        line = self._lines.get(request.model)
        if line is None:
            line = self._lines[request.model] = _Line()
        homes = line.homes.get(request.adapter)
        if homes is not None:
            return homes
        states = self._states(request.model)
        if not line.rendezvous.replica_ids:
            line.rendezvous = Rendezvous(_able(states))
        order = line.rendezvous.order(request.adapter)
        roomy = {s.replica_id for s in states if len(s.adapters) + len(s.loading) < s.max_adapters}
        return next(((replica_id,) for replica_id in order if replica_id in roomy), order[:1])

    def refresh(self) -> None:
        """Places every adapter anew by the demand so far."""
        for model_id, line in self._lines.items():
            states = self._states(model_id)
            able = _able(states)
            if able != line.rendezvous.replica_ids:
                line.rendezvous = Rendezvous(able)
            shares = line.demand.shares()
            shares.pop(NO_ADAPTER, None)
            line.homes = place(shares, line.rendezvous, _living(states), line.homes)

    def _on_timer(self) -> None:
        self._timer = None
        self.refresh()


def _able(states: tuple[ReplicaState, ...]) -> tuple[str, ...]:
    return tuple(sorted(s.replica_id for s in states if s.max_adapters and not s.draining))


def _living(states: tuple[ReplicaState, ...]) -> dict[str, list[str]]:
    """Where each adapter is resident or being loaded."""
    found: dict[str, list[str]] = {}
    for state in states:
        for adapter_id in (*state.adapters, *(name for name, _ in state.loading)):
            found.setdefault(adapter_id, []).append(state.replica_id)
    return found
