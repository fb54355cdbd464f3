"""Queue, route, send, retry: one job's way to a replica and its deltas' way back.

    hash ─► admission ─► policy ─► link ─► first delta ─► deltas … terminal delta
                           ▲                  │
                           └── next attempt ──┘   only while nothing was delivered

Once a delta was delivered, a lost replica is an error at once: never silence, never a second beginning.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from gateway.admission import Admission
from gateway.cold import too_late
from gateway.errors import (
    AdapterNotLoadableError,
    ApiError,
    ContextLengthError,
    DeadlineError,
    PayloadTooLargeError,
    ReplicaLostError,
    UnavailableError,
    from_fault,
)
from gateway.fleet import Fleet
from gateway.line import NO_REPLICA_RETRY_S, NO_REPLICA_S
from gateway.placement import Placement
from gateway.router import Router
from gateway.slot import DeltaSource, Surroundings
from gateway.ticket import Ticket
from gateway.types import Job
from replicas.channel import FrameTooLargeError, LinkLostError
from replicas.contract import EngineFacts, Fault, GenerateRequest, StepDelta
from routing.policy import NO_ADAPTERS, TOO_LONG
from routing.types import Decision, RouteRequest

MAX_DEATHS = 2
"""Replicas that may die over one request before it is refused: it may be what kills them."""

_DEATHS = frozenset({"engine_dead", "upstream_lost"})
_ELSEWHERE = frozenset({"draining", "overloaded"}) | _DEATHS
_NOT_LATER = frozenset({"overloaded", "adapter_not_found", "adapter_unreachable"})
"""What waiting for another replica does not mend, once all there are have said it."""


class FleetDispatcher:
    """Runs jobs on a fleet. Implements `gateway.types.Dispatcher`."""

    def __init__(self, fleet: Fleet, admission: Admission, router: Router, around: Surroundings) -> None:
        self.fleet = fleet
        self.admission = admission
        self.router = router
        self.around = around
        self.max_attempts = router.max_attempts

    def generate(self, job: Job) -> JobStream:
        """See `Dispatcher.generate`."""
        return JobStream(self, job)

    def facts(self, model_id: str) -> EngineFacts | None:
        return self.fleet.facts(model_id)

    def num_ready(self, model_id: str) -> int:
        return self.fleet.num_ready(model_id)

    def decision(self, request_id: str) -> Decision | None:
        """Why a recent job went where it went (its last attempt)."""
        return self.router.log.last(request_id)


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why an attempt came to nothing, in the client's words and in ours. `died`: the replica did not survive it.

    `final`: it would come to nothing anywhere.
    """

    error: ApiError
    reason: str
    died: bool
    final: bool


class JobStream:
    """The deltas of one job (`gateway.types.Deltas`). `replica_id` is where it runs, or ran last."""

    __slots__ = ("_dispatcher", "_failure", "_job", "_num_output", "_num_uncached", "_over", "_placement", "_source",
                 "_ticket", "num_attempts", "replica_id")  # fmt: skip

    def __init__(self, dispatcher: FleetDispatcher, job: Job) -> None:
        """For `FleetDispatcher.generate` only."""
        self.replica_id: str | None = None
        self.num_attempts = 0
        self._dispatcher = dispatcher
        self._job = job
        self._ticket: Ticket | None = None
        self._placement: Placement | None = None
        self._source: DeltaSource | None = None
        self._num_uncached = 0
        self._num_output = 0
        self._over = False
        self._failure: ApiError | None = None

    async def first(self) -> StepDelta:
        """Queues, routes, tries; cancelled, it leaves nothing behind."""
        try:
            delta = await self._first()
        except BaseException:
            self._end()
            raise
        self._count([delta])
        return delta

    def ready(self) -> list[StepDelta]:
        """See `gateway.types.Deltas.ready`."""
        if self._failure is not None:
            raise self._failure
        if self._source is None:
            return []
        try:
            deltas = self._source.ready()
        except LinkLostError as error:
            self._end()
            self._failure = ReplicaLostError(f"Replica {error.replica_id} was lost while it was answering.")
            raise self._failure from error
        if deltas:
            fault = _fault_of(deltas[-1])
            self._count(deltas)
            if fault is not None:
                self._failure = from_fault(fault)
                deltas.pop()
                if not deltas:
                    raise self._failure
        return deltas

    @property
    def over(self) -> bool:
        return self._over or (self._source is not None and self._source.over)

    def listen(self, callback: Callable[[], None] | None) -> None:
        """See `gateway.types.Deltas.listen`; only between the first delta and the last is there anything to hear."""
        if self._source is not None:
            self._source.listen(callback)

    def _count(self, deltas: list[StepDelta]) -> None:
        for delta in deltas:
            self._num_output += len(delta.token_ids)
        if deltas[-1].finish_reason is not None:
            self._end()

    async def aclose(self) -> None:
        """Cancels the job unless it has ended. Idempotent."""
        self._end()

    def _end(self) -> None:
        """Gives back everything it holds; at the replica too. Idempotent."""
        if self._over:
            return
        self._over = True
        if self._source is not None:
            self._source.listen(None)  # no cycle of references is left to the collector
            self._source = None
        if self._placement is not None:
            self._placement.close()
        if self._ticket is not None:
            self._ticket.served(self._num_uncached, self._num_output)
            self._ticket.close()

    async def _first(self) -> StepDelta:
        """Queue, then attempts, until there is a delta."""
        dispatcher, job = self._dispatcher, self._job
        request = dispatcher.router.request(job)
        try:
            self._ticket = await dispatcher.admission.acquire(job, request, dispatcher.router.num_uncached(request))
        except DeadlineError as error:  # it waited for a place, while its adapter may have been fetched for it
            raise too_late(job, dispatcher.fleet.states(job.model.id), 0.0) or error from None
        began = dispatcher.around.clock()
        try:
            async with asyncio.timeout(self._remaining_s()):
                delta = await self._attempt(request)
        except TimeoutError:
            placed = [s for s in dispatcher.fleet.states(job.model.id) if s.replica_id == self.replica_id]
            late = too_late(job, placed, dispatcher.around.clock() - began)
            raise late or DeadlineError("The deadline passed before the first token.") from None
        assert self._placement is not None
        if delta.num_cached_tokens is not None:
            self._num_uncached = job.num_prompt_tokens - delta.num_cached_tokens
        self._source = self._placement.source
        return delta

    async def _attempt(self, request: RouteRequest) -> StepDelta:
        """Tries replicas until one answers; raises what the last one said when it was enough."""
        num_deaths = 0
        failure: _Failure | None = None
        while True:
            placement = self._placement = await self._place(request, failure)
            answer = await _answer(placement)
            if not isinstance(answer, _Failure):
                return answer
            failure = answer
            placement.close()
            self._num_uncached = 0
            num_deaths += failure.died
            if failure.final or num_deaths >= MAX_DEATHS or self.num_attempts >= self._dispatcher.max_attempts:
                raise failure.error
            self._dispatcher.around.metrics.retries.labels(failure.reason).inc()
            request = _excluding(request, placement.replica_id)

    async def _place(self, request: RouteRequest, failure: _Failure | None) -> Placement:
        """Sends the request to the best replica; waits a while for one when there is none.

        `failure` is what the attempt before came to.
        """
        dispatcher = self._dispatcher
        give_up_at = dispatcher.around.clock() + NO_REPLICA_S
        while True:
            decision = self._decide(request)
            if decision.replica_id is not None:
                try:
                    return self._send(request, decision)
                except LinkLostError:  # it had not begun: this was no attempt
                    request = _excluding(request, decision.replica_id)
                    continue
            _check_able(request, decision, dispatcher.fleet)
            left_s = give_up_at - dispatcher.around.clock()
            if failure is not None and failure.reason in _NOT_LATER:
                raise failure.error
            if left_s <= 0:
                message = f"No replica of model '{request.model}' is available."
                if failure is not None:
                    message = f"{message} The last one said: {failure.error.message}"
                raise UnavailableError(message, retry_after_s=NO_REPLICA_RETRY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):  # not wait_for: its task would begin to listen a turn too late
                    await dispatcher.fleet.change()

    def _decide(self, request: RouteRequest) -> Decision:
        """What was decided when the job was let go, once and while it holds; else anew."""
        assert self._ticket is not None
        router = self._dispatcher.router
        decision = self._ticket.take_decision()
        if decision is not None and decision.replica_id is not None and self._is_ready(decision.replica_id):
            router.used(request, decision, self.num_attempts + 1)
            return decision
        return router.decide(request, self.num_attempts + 1)

    def _is_ready(self, replica_id: str) -> bool:
        return self._dispatcher.fleet.is_ready(replica_id)

    def _send(self, request: RouteRequest, decision: Decision) -> Placement:
        """Opens the next attempt where the decision says."""
        winner = decision.winner
        assert winner is not None and self._ticket is not None
        num_uncached = request.num_prompt_tokens - winner.matched_tokens
        attempt = self._generate_request(self._ticket, num_uncached)
        try:
            placement = self._dispatcher.fleet.place(winner.replica_id, attempt, num_uncached)
        except FrameTooLargeError as error:
            raise PayloadTooLargeError(f"The prompt is too large to be sent: {error}.") from error
        self._ticket.placed()
        self._dispatcher.router.placed(request, decision)
        self.num_attempts += 1
        self.replica_id = winner.replica_id
        self._num_uncached = num_uncached
        return placement

    def _generate_request(self, ticket: Ticket, num_uncached: int) -> GenerateRequest:
        job = self._job
        return GenerateRequest(
            request_id=job.request_id,
            prompt=job.prompt,
            sampling=job.sampling,
            attempt=self.num_attempts + 1,
            adapter=job.adapter,
            tenant=job.tenant.tenant_id,
            fair_tag=ticket.fair_tag,
            fair_weight=ticket.fair_weight,
            priority=job.priority,
            deadline_s=self._remaining_s(),
            num_uncached=num_uncached,
            salt=job.salt,
        )

    def _remaining_s(self) -> float | None:
        deadline = self._job.deadline
        return None if deadline is None else deadline - self._dispatcher.around.clock()


async def _answer(placement: Placement) -> StepDelta | _Failure:
    """The first delta, or why there was none."""
    try:
        delta = await placement.source.__anext__()
    except LinkLostError as lost:
        error = ReplicaLostError(f"Replica {lost.replica_id} was lost before it answered.")
        return _Failure(error, "lost", died=True, final=False)
    fault = _fault_of(delta)
    if fault is None:
        placement.answered()
        return delta
    died = fault.code in _DEATHS
    if died or fault.code == "internal":
        placement.failed()
    final = not fault.retryable and fault.code not in _ELSEWHERE
    return _Failure(from_fault(fault), fault.code, died=died, final=final)


def _fault_of(delta: StepDelta) -> Fault | None:
    """What made a terminal delta a failure; None for one that is none. Nobody aborts a job whose stream is read."""
    if delta.finish_reason == "error":
        return delta.fault or Fault("internal", "The engine failed without a reason.")
    if delta.finish_reason == "abort":
        return Fault("internal", "The replica ended the request.", retryable=True)
    return None


def _excluding(request: RouteRequest, replica_id: str) -> RouteRequest:
    return msgspec.structs.replace(request, excluded=request.excluded | {replica_id})


def _check_able(request: RouteRequest, decision: Decision, fleet: Fleet) -> None:
    """Raises when no replica can ever take the request: ContextLengthError, AdapterNotLoadableError."""
    reasons = {candidate.filtered for candidate in decision.candidates}
    if reasons == {TOO_LONG}:
        raise ContextLengthError(
            f"The prompt has {request.num_prompt_tokens} tokens; no replica of model '{request.model}' takes that many."
        )
    if reasons == {NO_ADAPTERS} and not fleet.takes_adapters(request.model):  # else one that does may come
        raise AdapterNotLoadableError(
            f"'{request.adapter}' is a LoRA adapter, and no replica of model '{request.model}' takes any: "
            "max_adapters is 0 in all of its groups.",
            param="model",
        )
