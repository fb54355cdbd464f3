"""Who may go next: bounds, fair order, late binding.

A job waits here, not at a replica: it leaves only when some replica of its model has a place for it, and then to the
best one. Each model has its own fair queue, so one model's backlog never stands before another's; the bounds are the
ingress's.

    acquire ─► bounds ─► fair queue ─► a place is free ─► Ticket ─ placed() ─► counted at the replica
                 │           │                              └ close(): the place given back, the charge corrected
                429      429 / 503 / 504 when it took too long
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from configs.schema import AdmissionConfig
from gateway.errors import ApiError, DeadlineError, QueueFullError, UnavailableError
from gateway.fair_queue import Charge, FairQueue
from gateway.queue_limits import Bounds, DrainRate
from gateway.types import Job
from ops.metrics import Metrics

NO_REPLICA_S = 10.0
"""How long a job waits for a model that has no replica at all: a start or a replacement may be under way."""

NO_REPLICA_RETRY_S = 5.0
MIN_TIMER_S = 0.005


class Capacity(Protocol):
    """Where jobs can go. `Admission.pump` must be called when either may have grown (or become zero)."""

    def num_free(self, model_id: str) -> int:
        """Places for one more job at the replicas of a model, those of tickets not yet placed included."""
        ...

    def num_ready(self, model_id: str) -> int:
        """Replicas of a model that can take requests at all."""
        ...


@dataclass(slots=True, eq=False)
class _Line:
    """What belongs to one model. `num_unplaced`: tickets given whose job no replica counts yet."""

    rate: DrainRate
    observe_wait: Callable[[float], None]
    queue: FairQueue[_Waiting] = field(default_factory=FairQueue)
    num_unplaced: int = 0
    absent_since: float | None = None


@dataclass(slots=True, eq=False)
class _Waiting:
    job: Job
    num_uncached: int
    since: float
    expires: float
    ticket: asyncio.Future[Ticket]


class Ticket:
    """Leave to run one job. `fair_tag` is its virtual start time. Close it in any case; a `with` block does.

    `served` says what was really used (uncached prompt tokens, output tokens); a ticket closed without costs its tenant
    nothing.
    """

    __slots__ = ("_charge", "_closed", "_line", "_owner", "_placed", "_served", "fair_tag", "model_id", "waited_s")

    def __init__(self, owner: Admission, line: _Line, waiting: _Waiting, charge: Charge) -> None:
        """For Admission only."""
        self.fair_tag = charge.tag
        self.model_id = waiting.job.model.id
        self.waited_s = 0.0
        self._owner = owner
        self._line = line
        self._charge = charge
        self._placed = False
        self._closed = False
        self._served = (0, 0)

    def placed(self) -> None:
        """The job is counted at a replica from now on (so its place is no longer ours). Idempotent."""
        if not self._placed:
            self._placed = True
            self._line.num_unplaced -= 1

    def served(self, num_uncached: int, num_output: int) -> None:
        """Tokens used so far, in all."""
        self._served = (num_uncached, num_output)

    def close(self) -> None:
        """Gives back what is left of it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._line.queue.settle(self._charge, *self._served)
        if not self._placed:
            self.placed()
            self._owner.pump(self.model_id)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Admission:
    """The fair queue of one ingress. `clock` is monotonic seconds, the one job deadlines are given in."""

    def __init__(
        self, config: AdmissionConfig, capacity: Capacity, clock: Callable[[], float], metrics: Metrics
    ) -> None:
        self._config = config
        self._capacity = capacity
        self._clock = clock
        self._metrics = metrics
        self._bounds = Bounds(config)
        self._lines: dict[str, _Line] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    @property
    def num_waiting(self) -> int:
        return self._bounds.num_jobs

    @property
    def num_unplaced(self) -> int:
        return sum(line.num_unplaced for line in self._lines.values())

    async def acquire(self, job: Job, num_uncached: int) -> Ticket:
        """Returns when the job may run; `num_uncached` estimates the prompt tokens no cache has.

        Raises QueueFullError at once when the bounds leave no room, or when `max_wait_s` has passed; DeadlineError at
        the job's deadline; UnavailableError when its model has had no replica for NO_REPLICA_S. Cancelled, it leaves
        no trace.
        """
        now = self._clock()
        model_id = job.model.id
        line = self._line(model_id)
        expires = now + self._config.max_wait_s
        if job.deadline is not None:
            expires = min(expires, job.deadline)
        waiting = _Waiting(job, num_uncached, now, expires, asyncio.get_running_loop().create_future())
        free = self._capacity.num_free(model_id) - line.num_unplaced
        if line.queue or free <= 0:
            self._make_room(line, waiting)
        line.queue.push(waiting)
        self._bounds.add(job)
        self.pump(model_id)
        if not waiting.ticket.done():
            await self._wait(line, waiting)
        ticket = waiting.ticket.result()
        ticket.waited_s = self._clock() - now
        line.observe_wait(ticket.waited_s)
        return ticket

    def pump(self, model_id: str) -> None:
        """Lets go whom there is a place for; to be called when a model's capacity may have changed. Cheap."""
        line = self._lines.get(model_id)
        if line is None or not line.queue:
            return
        free = self._capacity.num_free(model_id) - line.num_unplaced
        while free > 0 and line.queue:
            waiting, charge = line.queue.pop()
            self._bounds.remove(waiting.job)
            line.num_unplaced += 1
            line.rate.add(charge.cost)
            waiting.ticket.set_result(Ticket(self, line, waiting, charge))
            free -= 1
        if self._capacity.num_ready(model_id):
            line.absent_since = None
        elif line.absent_since is None:
            line.absent_since = self._clock()
            self._arm(min((self._expiry(line, waiting) for waiting in line.queue), default=None))

    def expire(self) -> None:
        """Ends the wait of everyone whose time is over. The timer calls it; with a clock of your own, you may."""
        now = self._clock()
        following: list[float] = []
        for line in self._lines.values():
            for waiting in list(line.queue):
                at = self._expiry(line, waiting)
                if at <= now:
                    self._fail(line, waiting, self._too_late(line, waiting, now))
                else:
                    following.append(at)
        self._stop_timer()
        self._arm(min(following, default=None))

    def retry_after_s(self, model_id: str) -> float:
        """When a job refused now would have a chance: the backlog over the rate it has been going down at."""
        line = self._lines.get(model_id)
        if line is None:
            return 1.0
        return line.rate.seconds_for(line.queue.backlog())

    def close(self) -> None:
        """Refuses everyone who waits."""
        self._stop_timer()
        for line in self._lines.values():
            for waiting in list(line.queue):
                self._fail(line, waiting, UnavailableError("The gateway is shutting down.", retry_after_s=1.0))
        self._stop_timer()

    def check(self) -> None:
        """Asserts that queues, bounds and tickets agree; for tests."""
        jobs = [waiting.job for line in self._lines.values() for waiting in line.queue]
        self._bounds.check(jobs)
        for line in self._lines.values():
            line.queue.check()
            assert line.num_unplaced >= 0
            assert not any(waiting.ticket.done() for waiting in line.queue)

    def _make_room(self, line: _Line, waiting: _Waiting) -> None:
        """Sees that the bounds hold with one more; refuses it, or the newest of whoever takes more than its share."""
        refused = self._bounds.overflow(waiting.job)
        while refused is not None:
            hog = self._bounds.hog(waiting.job)
            if hog is None:
                raise self._full(waiting.job, refused)
            for other in self._lines.values():
                victim = other.queue.newest(hog)
                if victim is not None:
                    self._fail(other, victim, self._full(victim.job, refused))
                    break
            refused = self._bounds.overflow(waiting.job)

    async def _wait(self, line: _Line, waiting: _Waiting) -> None:
        self._arm(self._expiry(line, waiting))
        ticket = waiting.ticket
        try:
            await asyncio.wait((ticket,))
        except asyncio.CancelledError:
            if not ticket.done():
                self._forget(line, waiting)
            elif ticket.exception() is None:
                ticket.result().close()
            raise

    def _forget(self, line: _Line, waiting: _Waiting) -> None:
        line.queue.remove(waiting)
        self._bounds.remove(waiting.job)

    def _fail(self, line: _Line, waiting: _Waiting, error: ApiError) -> None:
        self._forget(line, waiting)
        waiting.ticket.set_exception(error)

    def _line(self, model_id: str) -> _Line:
        line = self._lines.get(model_id)
        if line is None:
            observe_wait = self._metrics.queue_wait_seconds.labels(model_id).observe
            line = self._lines[model_id] = _Line(DrainRate(self._clock), observe_wait)
            queue = line.queue
            self._metrics.queue_depth.labels(model_id).set_function(lambda: len(queue))
            self._metrics.queue_tokens.labels(model_id).set_function(
                lambda: sum(waiting.job.num_prompt_tokens for waiting in queue)
            )
        return line

    def _expiry(self, line: _Line, waiting: _Waiting) -> float:
        if line.absent_since is None:
            return waiting.expires
        return min(waiting.expires, max(line.absent_since, waiting.since) + NO_REPLICA_S)

    def _too_late(self, line: _Line, waiting: _Waiting, now: float) -> ApiError:
        model_id, waited_s = waiting.job.model.id, now - waiting.since
        if waiting.job.deadline is not None and waiting.job.deadline <= now:
            return DeadlineError(f"The request waited {waited_s:.1f} s for model '{model_id}', to its deadline.")
        if line.absent_since is not None and now < waiting.expires:
            message = f"No replica of model '{model_id}' is available."
            return UnavailableError(message, retry_after_s=NO_REPLICA_RETRY_S)
        return QueueFullError(
            f"The request waited {waited_s:.1f} s for a place at model '{model_id}'; try again later.",
            code="queue_timeout",
            retry_after_s=self.retry_after_s(model_id),
        )

    def _full(self, job: Job, why: str) -> QueueFullError:
        message = f"The gateway's queue is full: {why}."
        return QueueFullError(message, retry_after_s=self.retry_after_s(job.model.id))

    def _arm(self, at: float | None) -> None:
        """Sees that `expire` runs at that time or earlier."""
        if at is None or (self._timer is not None and self._timer_at <= at):
            return
        self._stop_timer()
        delay_s = max(at - self._clock(), MIN_TIMER_S)
        self._timer_at = at
        self._timer = asyncio.get_running_loop().call_later(delay_s, self.expire)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
