"""The seam of late binding: who leaves the ingress's queue next, and for which replica.

A binding looks at the queue and at the replicas as the ingress sees them, and takes one request out or none. It is
called again until it takes none, whenever a request or news of a replica arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Protocol, TypeAlias

from gateway.binding import LookAhead, Nobody, Outlook
from gateway.fair_queue import Charge, FairQueue
from gateway.types import Job
from routing.types import Decision, ReplicaState, RouteRequest


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the ingress's queue. `num_uncached`: what the warmest replica would compute, at arrival."""

    index: int
    job: Job
    route: RouteRequest
    num_uncached: int
    arrival_s: float
    due: float
    outlook: Outlook | None = None

    @property
    def since(self) -> float:
        return self.arrival_s

    @property
    def expires(self) -> float:
        """Never: what comes of load is to be seen."""
        return inf


@dataclass(frozen=True, slots=True)
class Bound:
    """A request that has left the queue, what its tenant was charged, and where it goes (a replica, in any case)."""

    waiting: Waiting
    charge: Charge
    decision: Decision


class Binder(Protocol):
    """What a binding may use."""

    @property
    def queue(self) -> FairQueue[Waiting]: ...

    def has_place(self) -> bool:
        """Whether any replica can take one more."""
        ...

    @property
    def now(self) -> float: ...

    def states(self) -> tuple[ReplicaState, ...]:
        """The replicas as they are believed to be; `full` says that one can take no more."""
        ...

    def decide(self, route: RouteRequest) -> Decision:
        """Where the policy would send it now."""
        ...

    def weigh(self, route: RouteRequest, replicas: tuple[ReplicaState, ...]) -> Decision:
        """Which of these the policy prefers."""
        ...

    def look_again(self, at: float) -> None:
        """The binding wants to be called at that time, even if nothing happens."""
        ...


Binding: TypeAlias = Callable[[Binder], Bound | None]


def in_fair_order(binder: Binder) -> Bound | None:
    """The fair queue says who, then the policy says where: `gateway.admission.FairOrder`."""
    if not binder.queue or not binder.has_place():
        return None
    waiting, charge = binder.queue.pop()
    return Bound(waiting, charge, binder.decide(waiting.route))


def looking_ahead(limit: int) -> Binding:
    """Request and replica are chosen together, as in the gateway: see `gateway.binding`."""
    choose = LookAhead(limit)

    def bind(binder: Binder) -> Bound | None:
        found = choose(binder.queue, binder)
        if isinstance(found, Nobody):
            binder.look_again(found.until)
            return None
        charge = binder.queue.take(found.waiting)
        assert found.decision is not None, "it has been weighed"
        return Bound(found.waiting, charge, found.decision)

    return bind
