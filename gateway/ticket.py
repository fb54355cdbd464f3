"""Leave to run one job, from the queue's point of view."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from gateway.fair_queue import Charge
from routing.types import Decision


class Reservation(Protocol):
    """A place kept at a replica for a job that is about to be sent there."""

    def close(self) -> None:
        """Gives the place back, or to the job itself. Idempotent."""
        ...


class TicketOffice(Protocol):
    """Who gave the ticket."""

    def placed(self) -> None:
        """A job that no place was kept for is counted at a replica."""
        ...

    def returned(self) -> None:
        """The job was never placed: somebody else may have what was kept for it."""
        ...

    def settle(self, charge: Charge, num_uncached: int, num_output: int) -> None: ...


class Ticket:
    """Leave to run one job. Close it in any case; a `with` block does.

    `fair_tag` is its virtual start time, `fair_weight` its tenant's weight; `waited_s` how long it waited. `served`
    says what was really used (uncached prompt tokens, output tokens); a ticket closed without costs its tenant nothing.
    """

    __slots__ = ("_charge", "_closed", "_decision", "_office", "_placed", "_reservation", "_served", "fair_tag",
                 "fair_weight", "waited_s")  # fmt: skip

    def __init__(self, office: TicketOffice, charge: Charge, bound: tuple[Decision | None, Reservation | None]) -> None:
        """For Admission only."""
        self.fair_tag = charge.tag
        self.fair_weight = charge.weight
        self.waited_s = 0.0
        self._decision, self._reservation = bound
        self._office = office
        self._charge = charge
        self._placed = False
        self._closed = False
        self._served = (0, 0)

    def take_decision(self) -> Decision | None:
        """The replica that was chosen together with the job, if one was; the first time it is asked for."""
        decision, self._decision = self._decision, None
        return decision

    def placed(self) -> None:
        """The job is counted at a replica from now on (so its place is no longer ours). Idempotent."""
        if not self._placed:
            self._placed = True
            if self._reservation is None:
                self._office.placed()
            else:
                self._reservation.close()

    def served(self, num_uncached: int, num_output: int) -> None:
        """Tokens used so far, in all."""
        self._served = (num_uncached, num_output)

    def close(self) -> None:
        """Gives back what is left of it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._office.settle(self._charge, *self._served)
        if not self._placed:
            self.placed()
            self._office.returned()

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
