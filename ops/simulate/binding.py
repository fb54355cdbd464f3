"""The seam of late binding: who leaves the ingress's queue next, and for which replica.

A binding looks at the queue and at the replicas as the ingress sees them, and takes one request out or none. It is
called again until it takes none, whenever a request or news of a replica arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

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

    def states(self) -> tuple[ReplicaState, ...]:
        """The replicas as they are believed to be; `full` says that one can take no more."""
        ...

    def decide(self, route: RouteRequest) -> Decision:
        """Where the policy would send it now."""
        ...


Binding: TypeAlias = Callable[[Binder], Bound | None]


def in_fair_order(binder: Binder) -> Bound | None:
    """The fair queue says who, then the policy says where: what `gateway.admission` does."""
    if not binder.queue or not binder.has_place():
        return None
    waiting, charge = binder.queue.pop()
    return Bound(waiting, charge, binder.decide(waiting.route))
