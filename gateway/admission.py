"""Who may go next: bounds, fair order, late binding.

A job waits here, not at a replica: it leaves only when some replica of its model has a place for it. Each model has its
own line, so one model's backlog never stands before another's; the bounds are the ingress's.

    acquire ─► bounds ─► line ─► `gateway.binding`: who, and where ─► Ticket ─ placed() ─► counted at the replica
                 │         │                                            └ close(): the place and the charge given back
                429    429 / 503 / 504 when it took too long
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from typing import Protocol

from configs.schema import AdmissionConfig
from gateway.alarm import Alarm
from gateway.binding import Nobody, Pair
from gateway.errors import ApiError, QueueFullError, UnavailableError
from gateway.fair_queue import FairQueue
from gateway.line import Line, Waiting
from gateway.queue_limits import Bounds
from gateway.slot import Surroundings
from gateway.ticket import Reservation, Ticket
from gateway.types import Job
from routing.types import RouteRequest


class Capacity(Protocol):
    """Where jobs can go. `Admission.pump` must be called when either may have grown (or become zero)."""

    def num_free(self, model_id: str) -> int:
        """Places for one more job at the replicas of a model, those of tickets not yet placed included."""
        ...

    def num_ready(self, model_id: str) -> int:
        """Replicas of a model that can take requests at all."""
        ...


class Matching(Protocol):
    """Who of a model's line goes next, and where."""

    def due(self, waiting: Waiting) -> float:
        """What orders the jobs of one tenant."""
        ...

    def stays(self, waiting: Waiting) -> None:
        """A job could not go at once."""
        ...

    def next(self, queue: FairQueue[Waiting], model_id: str, num_free: int) -> Pair[Waiting] | Nobody:
        """To be asked again until it names nobody."""
        ...

    def reserve(self, pair: Pair[Waiting]) -> Reservation | None:
        """Keeps the place of somebody who goes, until it is placed there; None where none is kept."""
        ...


def _ignore(route: RouteRequest) -> None:
    """The default prefetch."""


class FairOrder:
    """Who is next in fair order, as soon as there is a place anywhere; where is decided when it is sent.

    `prefetch` hears of requests that have to wait.
    """

    def __init__(self, prefetch: Callable[[RouteRequest], None] = _ignore) -> None:
        self._prefetch = prefetch

    def due(self, waiting: Waiting) -> float:
        return waiting.since

    def stays(self, waiting: Waiting) -> None:
        self._prefetch(waiting.route)

    def next(self, queue: FairQueue[Waiting], model_id: str, num_free: int) -> Pair[Waiting] | Nobody:
        return Pair(queue.turns(1)[0].waiting, None) if queue and num_free > 0 else Nobody()

    def reserve(self, pair: Pair[Waiting]) -> Reservation | None:
        return None


FAIR_ORDER = FairOrder()


class Admission:
    """The lines of one ingress. Job deadlines are on `around.clock`."""

    def __init__(
        self, config: AdmissionConfig, capacity: Capacity, around: Surroundings, matching: Matching = FAIR_ORDER
    ) -> None:
        self._config = config
        self._capacity = capacity
        self._matching = matching
        self._clock = around.clock
        self._metrics = around.metrics
        self._bounds = Bounds(config)
        self.on_line: Callable[[str, FairQueue[Waiting]], None] = lambda model_id, queue: None
        self._lines: dict[str, Line] = {}
        self._looks: dict[str, float] = {}
        self._expiry_alarm = Alarm(self.expire, around.clock)
        self._look_alarm = Alarm(self._look_again, around.clock)

    @property
    def num_waiting(self) -> int:
        return self._bounds.num_jobs

    @property
    def num_unplaced(self) -> int:
        return sum(line.num_unplaced for line in self._lines.values())

    async def acquire(self, job: Job, route: RouteRequest, num_uncached: int) -> Ticket:
        """Returns when the job may run; `num_uncached` estimates the prompt tokens no cache has.

        Raises QueueFullError at once when the bounds leave no room, or when `max_wait_s` has passed; DeadlineError at
        the job's deadline; UnavailableError when its model has had no replica for NO_REPLICA_S. Cancelled, it leaves
        no trace.
        """
        now = self._clock()
        line = self._line(job.model.id)
        expires = now + self._config.max_wait_s
        if job.deadline is not None:
            expires = min(expires, job.deadline)
        ticket: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        waiting = Waiting(job, route, num_uncached, now, expires, ticket)
        if line.queue or self._num_free(line) <= 0:
            self._make_room(line, waiting)
        waiting.due = self._matching.due(waiting)
        line.queue.push(waiting, waiting.due)
        self._bounds.add(job)
        try:
            self.pump(line.model_id)
            if not ticket.done():
                self._matching.stays(waiting)
                self._expiry_alarm.set(line.stays(waiting))
                await asyncio.wait((ticket,))
        except BaseException:  # cancelled, or a fault in a policy: it leaves no trace
            self._leave(line, waiting)
            raise
        given = ticket.result()
        given.waited_s = self._clock() - now
        self._metrics.queue_wait_seconds.labels(line.model_id).observe(given.waited_s)
        return given

    def pump(self, model_id: str) -> None:
        """Lets go whom there is a place for; to be called when a model's capacity may have changed. Cheap."""
        line = self._lines.get(model_id)
        if line is None or not line.queue:
            return
        while True:
            found = self._matching.next(line.queue, model_id, self._num_free(line))
            if isinstance(found, Nobody):
                break
            self._let_go(line, found)
        if found.until < inf:
            self._looks[model_id] = found.until
            self._look_alarm.set(found.until)
        if self._capacity.num_ready(model_id):
            line.absent_since = None
        elif line.absent_since is None:
            line.absent_since = self._clock()
            self._expiry_alarm.set(line.next_expiry())

    def expire(self) -> None:
        """Ends the wait of everyone whose time is over. The timer calls it; with a clock of your own, you may."""
        now = self._clock()
        for line in self._lines.values():
            for waiting in line.expired(now):
                self._fail(line, waiting, line.too_late(waiting, now))
        self._expiry_alarm.stop()
        self._expiry_alarm.set(min((line.next_expiry() for line in self._lines.values()), default=inf))

    def retry_after_s(self, model_id: str) -> float:
        """When a job refused now would have a chance."""
        line = self._lines.get(model_id)
        return 1.0 if line is None else line.retry_after_s()

    def close(self) -> None:
        """Refuses everyone who waits."""
        for line in self._lines.values():
            for waiting in list(line.queue):
                self._fail(line, waiting, UnavailableError("The gateway is shutting down.", retry_after_s=1.0))
        self._expiry_alarm.stop()
        self._look_alarm.stop()

    def check(self) -> None:
        """Asserts that queues, bounds and tickets agree; for tests."""
        jobs = [waiting.job for line in self._lines.values() for waiting in line.queue]
        self._bounds.check(jobs)
        for line in self._lines.values():
            line.queue.check()
            assert line.num_unplaced >= 0
            assert not any(waiting.ticket.done() for waiting in line.queue)

    def _num_free(self, line: Line) -> int:
        return self._capacity.num_free(line.model_id) - line.num_unplaced

    def _let_go(self, line: Line, pair: Pair[Waiting]) -> None:
        waiting = pair.waiting
        charge = line.queue.take(waiting)
        self._bounds.remove(waiting.job)
        reservation = self._matching.reserve(pair)
        if reservation is None:
            line.num_unplaced += 1
        line.let_go(waiting, Ticket(line, charge, (pair.decision, reservation)), charge.cost)

    def _look_again(self) -> None:
        now = self._clock()
        due = [model_id for model_id, at in self._looks.items() if at <= now]
        for model_id in due:
            del self._looks[model_id]
            self.pump(model_id)
        self._look_alarm.set(min(self._looks.values(), default=inf))

    def _make_room(self, line: Line, waiting: Waiting) -> None:
        """Sees that the bounds hold with one more; refuses it, or the newest of whoever takes more than its share."""
        refused = self._bounds.overflow(waiting.job)
        while refused is not None:
            hog = self._bounds.hog(waiting.job)
            if hog is None:
                raise _full(line, refused)
            for other in self._lines.values():
                victim = other.queue.newest(hog)
                if victim is not None:
                    self._fail(other, victim, _full(other, refused))
                    break
            refused = self._bounds.overflow(waiting.job)

    def _leave(self, line: Line, waiting: Waiting) -> None:
        """Whoever asked for it is gone."""
        ticket = waiting.ticket
        if not ticket.done():
            self._forget(line, waiting)
            ticket.cancel()
        elif ticket.exception() is None:
            ticket.result().close()

    def _forget(self, line: Line, waiting: Waiting) -> None:
        line.queue.remove(waiting)
        self._bounds.remove(waiting.job)

    def _fail(self, line: Line, waiting: Waiting, error: ApiError) -> None:
        self._forget(line, waiting)
        waiting.ticket.set_exception(error)

    def _line(self, model_id: str) -> Line:
        line = self._lines.get(model_id)
        if line is None:
            line = self._lines[model_id] = Line(model_id, self._clock, self.pump)
            line.measure(self._metrics)
            self.on_line(model_id, line.queue)
        return line


def _full(line: Line, why: str) -> QueueFullError:
    return QueueFullError(f"The gateway's queue is full: {why}.", retry_after_s=line.retry_after_s())
