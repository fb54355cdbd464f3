"""Requests that would wait for their adapter beyond their deadline: told at once when to come back, while it is loaded.

deadline ≥ expected wait ─► it waits          deadline < expected wait ─► refused with Retry-After, the load goes on
nothing measured yet     ─► it waits; given up at its deadline, the load goes on
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from replicas.adapter_loads import AdapterLoader
from replicas.adapter_slots import AdapterSlots
from replicas.adapter_waiters import Waiting
from replicas.contract import AdapterSpec, Fault, GenerateRequest

_SLACK_S = 0.05
"""Whoever gives up this little before its deadline has given up because of it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where adapters are loaded. `use_s`: how long one is in use, in the mean."""

    slots: AdapterSlots
    loader: AdapterLoader
    use_s: Callable[[], float]


class Promises:
    """Adapters that are loaded for somebody who will come back. `keep(spec)`: it is to stay for a while once it is
    there, as far as that is possible."""

    def __init__(self, place: Place, keep: Callable[[AdapterSpec], object]) -> None:
        self._place = place
        self._keep = keep
        self._promised: set[str] = set()

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._promised

    def refusal(self, request: GenerateRequest, spec: AdapterSpec | None) -> Fault | None:
        """Why a request need not wait for an adapter that is not there: it would wait in vain. The load begins."""
        slots, loader = self._place.slots, self._place.loader
        expected_s = None if spec is None else loader.expected_s(spec)
        if spec is None or request.deadline_s is None or expected_s is None:
            return None
        is_full = not slots.has_room and not loader.has_begun(spec.adapter_id)
        if is_full:  # the first of n uses ends after about 1/n of their mean time
            expected_s += self._place.use_s() / slots.num_slots
        if expected_s <= request.deadline_s:
            return None
        is_full |= not self.make(spec)
        code = "adapter_slots_busy" if is_full else "adapter_loading"
        why = "after a slot for it is free" if is_full else "being loaded"
        message = (
            f"adapter {spec.adapter_id} is not there yet: it will be in about {expected_s:.1f} s, {why}, and the "
            f"request's deadline is in {request.deadline_s:.1f} s"
        )
        return Fault(code, message, param="model", retry_after_s=expected_s)

    def make(self, spec: AdapterSpec) -> bool:
        """It will be loaded though nobody waits; of as many at a time as there are slots. Whether it will."""
        if len(self._promised) < self._place.slots.num_slots:
            self._promised.add(spec.adapter_id)
            self._keep(spec)
            self._place.loader.want(spec)
        return spec.adapter_id in self._promised

    def given_up(self, waiting: Waiting, spec: AdapterSpec | None, now: float) -> None:
        """A request that waited was aborted: at its deadline, it may come back."""
        deadline_s = waiting.request.deadline_s
        if spec is not None and deadline_s is not None and now - waiting.since >= deadline_s - _SLACK_S:
            self.make(spec)

    def ended(self, adapter_id: str) -> None:
        """It is there, or cannot be."""
        self._promised.discard(adapter_id)
