"""What waits for one model: its fair queue, and when waiting has been too long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf

from gateway.binding import Outlook
from gateway.errors import ApiError, DeadlineError, QueueFullError, UnavailableError
from gateway.fair_queue import Charge, FairQueue
from gateway.queue_limits import DrainRate
from gateway.ticket import Ticket
from gateway.types import Job
from ops.metrics import Metrics
from routing.types import RouteRequest

NO_REPLICA_S = 10.0
"""How long a job waits for a model that has no replica at all: a start or a replacement may be under way."""

NO_REPLICA_RETRY_S = 5.0

_SLACK = 64


@dataclass(slots=True, eq=False)
class Waiting:
    """One job in a line (`gateway.binding.Waits`); whoever's `ticket` is done waits no more."""

    job: Job
    route: RouteRequest
    num_uncached: int
    since: float
    expires: float
    ticket: asyncio.Future[Ticket]
    due: float = 0.0
    outlook: Outlook | None = None


class Line:
    """`num_unplaced`: tickets given without a place kept for them, whose job no replica counts yet.

    `absent_since`: since when the model has had no replica. `on_returned` hears of tickets that were never placed.
    """

    def __init__(self, model_id: str, clock: Callable[[], float], on_returned: Callable[[str], None]) -> None:
        self.model_id = model_id
        self.queue: FairQueue[Waiting] = FairQueue()
        self.rate = DrainRate(clock)
        self.num_unplaced = 0
        self.absent_since: float | None = None
        self._clock = clock
        self._on_returned = on_returned
        self._numbers = count()
        self._expiries: list[tuple[float, int, Waiting]] = []

    def measure(self, metrics: Metrics) -> None:
        """Lets the line be seen from outside."""
        queue = self.queue
        metrics.queue_depth.labels(self.model_id).set_function(lambda: len(queue))
        metrics.queue_tokens.labels(self.model_id).set_function(
            lambda: sum(waiting.job.num_prompt_tokens for waiting in queue)
        )

    def let_go(self, waiting: Waiting, ticket: Ticket, cost: float) -> None:
        """The job may run."""
        self.rate.add(cost)
        waiting.ticket.set_result(ticket)

    def retry_after_s(self) -> float:
        """When a job refused now would have a chance: the backlog over the rate it has been going down at."""
        return self.rate.seconds_for(self.queue.backlog())

    # Waiting too long.

    def stays(self, waiting: Waiting) -> float:
        """A job could not go at once; returns when its wait is over at the latest."""
        if len(self._expiries) > 2 * len(self.queue) + _SLACK:
            self._expiries = [entry for entry in self._expiries if not entry[2].ticket.done()]
            heapify(self._expiries)
        heappush(self._expiries, (waiting.expires, next(self._numbers), waiting))
        return self._expiry(waiting)

    def expired(self, now: float) -> list[Waiting]:
        """Those whose time is over."""
        if self.absent_since is not None:
            return [waiting for waiting in self.queue if self._expiry(waiting) <= now]
        found = []
        while self.next_expiry() <= now:
            found.append(heappop(self._expiries)[2])
        return found

    def next_expiry(self) -> float:
        """When the next one's time will be over; infinity when nobody waits."""
        if self.absent_since is not None:
            return min(map(self._expiry, self.queue), default=inf)
        heap = self._expiries
        while heap and heap[0][2].ticket.done():
            heappop(heap)
        return heap[0][0] if heap else inf

    def too_late(self, waiting: Waiting, now: float) -> ApiError:
        """What to tell one whose time is over."""
        waited_s = now - waiting.since
        if waiting.job.deadline is not None and waiting.job.deadline <= now:
            return DeadlineError(f"The request waited {waited_s:.1f} s for model '{self.model_id}', to its deadline.")
        if self.absent_since is not None and now < waiting.expires:
            message = f"No replica of model '{self.model_id}' is available."
            return UnavailableError(message, retry_after_s=NO_REPLICA_RETRY_S)
        return QueueFullError(
            f"The request waited {waited_s:.1f} s for a place at model '{self.model_id}'; try again later.",
            code="queue_timeout",
            retry_after_s=self.retry_after_s(),
        )

    def _expiry(self, waiting: Waiting) -> float:
        if self.absent_since is None:
            return waiting.expires
        return min(waiting.expires, max(self.absent_since, waiting.since) + NO_REPLICA_S)

    # What its tickets tell (`gateway.ticket.TicketOffice`).

    def placed(self) -> None:
        """A job that nothing was kept for is counted at its replica."""
        self.num_unplaced -= 1

    def returned(self) -> None:
        """A ticket was closed without its job ever being placed."""
        self._on_returned(self.model_id)

    def settle(self, charge: Charge, num_uncached: int, num_output: int) -> None:
        self.queue.settle(charge, num_uncached, num_output)
