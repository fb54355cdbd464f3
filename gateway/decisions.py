"""Why requests went where they went: the decisions of one ingress, kept for a while, and as they are shown.

chatcmpl-wg01234567-<24 hex digits>-1      what a client may ask for: the answer's id, or the id in x-request-id,
         ^ingress   ^request        ^choice  with or without a choice, or the id the client gave itself
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from routing.types import Decision, ReplicaState, RouteRequest

MAX_CANDIDATES = 60_000
"""What is kept, in replicas weighed: 15,000 requests at four replicas in 35 MB, 940 at 64 in 22 MB."""

MAX_PER_CHOICE = 16
"""Decisions kept of one sequence; one that finds no replica for long would have hundreds."""

MAX_SHOWN = 64
MAX_NAMES = 10_000

_ANSWER_ID = re.compile(r"(?:chatcmpl-|cmpl-)?(([A-Za-z0-9]{1,32})-[0-9a-f]{24})(?:-([0-9]{1,4}))?")


class ShownCandidate(msgspec.Struct, frozen=True):
    """One replica weighed. `adapter`: whether it has the request's adapter (resident, loading, absent).

    `filtered`: why it was not weighed; then it has no terms.
    """

    replica_id: str
    matched_tokens: int = 0
    adapter: str | None = None
    cost_s: float = 0.0
    terms_s: dict[str, float] = {}
    filtered: str | None = None


class ShownDecision(msgspec.Struct, frozen=True):
    """One decision. `time`: Unix seconds. `replica_id` is the winner, null when there was none."""

    choice: int
    attempt: int
    time: float
    policy: str
    replica_id: str | None
    reason: str
    num_prompt_tokens: int
    candidates: tuple[ShownCandidate, ...]


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Every decision about one request, the oldest first. `num_left_out`: more than are shown."""

    object: str = "routing.decisions"
    request_id: str
    ingress_id: str
    tenant: str
    model: str
    adapter: str | None
    decisions: tuple[ShownDecision, ...]
    num_left_out: int = 0


class Asked(NamedTuple):
    """An id as somebody gives it, taken apart. `ingress_id` is None for one that is not of ours."""

    request_id: str
    ingress_id: str | None = None
    choice: int | None = None


def parse(asked: str) -> Asked:
    """Takes an id apart; one that is none of ours may be a client's own name for a request."""
    match = _ANSWER_ID.fullmatch(asked)
    if match is None:
        return Asked(asked)
    request_id, ingress_id, choice = match.groups()
    return Asked(request_id, ingress_id, None if choice is None else int(choice))


class _Record(msgspec.Struct, frozen=True):
    """`adapters`: replicas where the request's adapter is not absent, and how; None without an adapter."""

    time: float
    attempt: int
    num_prompt_tokens: int
    decision: Decision
    adapters: dict[str, str] | None


class _Trace(msgspec.Struct):
    """One HTTP request: its decisions by choice."""

    tenant: str
    model: str
    adapter: str | None
    choices: dict[int, list[_Record]] = {}
    num_candidates: int = 0


class DecisionLog:
    """The last decisions of an ingress. `wall`: Unix seconds."""

    def __init__(self, ingress_id: str, wall: Callable[[], float], max_candidates: int = MAX_CANDIDATES) -> None:
        self.ingress_id = ingress_id
        self._wall = wall
        self._max_candidates = max_candidates
        self._traces: OrderedDict[str, _Trace] = OrderedDict()
        self._names: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._num_candidates = 0

    def add(self, request: RouteRequest, decision: Decision, attempt: int, replicas: Sequence[ReplicaState]) -> None:
        """Keeps a decision; `replicas` are those it was made about. The oldest requests make room."""
        request_id, choice = _of_job(request.request_id)
        trace = self._traces.get(request_id)
        if trace is None:
            trace = self._traces[request_id] = _Trace(request.tenant, request.model, request.adapter)
        adapters = None if request.adapter is None else _where(request.adapter, replicas)
        record = _Record(self._wall(), attempt, request.num_prompt_tokens, decision, adapters)
        records = trace.choices.setdefault(choice, [])
        records.append(record)
        self._count(trace, len(decision.candidates))
        if len(records) > MAX_PER_CHOICE:
            self._count(trace, -len(records.pop(0).decision.candidates))
        while self._num_candidates > self._max_candidates and len(self._traces) > 1:
            self._num_candidates -= self._traces.popitem(last=False)[1].num_candidates

    def name(self, tenant: str, client_request_id: str, request_id: str) -> None:
        """A tenant calls its request by a name of its own; the last one of that name counts."""
        self._names[tenant, client_request_id] = request_id
        self._names.move_to_end((tenant, client_request_id))
        if len(self._names) > MAX_NAMES:
            self._names.popitem(last=False)

    def find(self, asked: Asked, tenant: str) -> Explanation | None:
        """What is known of a tenant's own request; None for any other."""
        request_id = self._names.get((tenant, asked.request_id), asked.request_id)
        trace = self._traces.get(request_id)
        if trace is None or trace.tenant != tenant:
            return None
        shown = [
            _shown(choice, record)
            for choice, records in trace.choices.items()
            if asked.choice is None or asked.choice == choice
            for record in records
        ]
        if not shown:
            return None
        shown.sort(key=lambda decision: (decision.time, decision.choice, decision.attempt))
        return Explanation(
            request_id=request_id,
            ingress_id=self.ingress_id,
            tenant=tenant,
            model=trace.model,
            adapter=trace.adapter,
            decisions=tuple(shown[:MAX_SHOWN]),
            num_left_out=max(0, len(shown) - MAX_SHOWN),
        )

    def last(self, job_id: str) -> Decision | None:
        """The last decision about one sequence."""
        request_id, choice = _of_job(job_id)
        trace = self._traces.get(request_id)
        records = None if trace is None else trace.choices.get(choice)
        return records[-1].decision if records else None

    def _count(self, trace: _Trace, num_candidates: int) -> None:
        trace.num_candidates += num_candidates
        self._num_candidates += num_candidates


def _of_job(job_id: str) -> tuple[str, int]:
    """A job's id is its request's, a dash, and the number of the choice."""
    request_id, _, choice = job_id.rpartition("-")
    return (request_id, int(choice)) if request_id and choice.isdecimal() else (job_id, 0)


def _where(adapter: str, replicas: Sequence[ReplicaState]) -> dict[str, str]:
    """The replicas that have the adapter, or will have it soon."""
    found = {r.replica_id: "loading" for r in replicas if r.loading and any(name == adapter for name, _ in r.loading)}
    return found | {r.replica_id: "resident" for r in replicas if adapter in r.adapters}


def _shown(choice: int, record: _Record) -> ShownDecision:
    decision = record.decision
    return ShownDecision(
        choice=choice,
        attempt=record.attempt,
        time=round(record.time, 6),
        policy=decision.policy,
        replica_id=decision.replica_id,
        reason=decision.reason,
        num_prompt_tokens=record.num_prompt_tokens,
        candidates=tuple(
            ShownCandidate(
                replica_id=candidate.replica_id,
                matched_tokens=candidate.matched_tokens,
                adapter=None if record.adapters is None else record.adapters.get(candidate.replica_id, "absent"),
                cost_s=round(candidate.cost_s, 6),
                terms_s={term: round(seconds, 6) for term, seconds in candidate.terms_s.items()},
                filtered=candidate.filtered,
            )
            for candidate in decision.candidates
        ),
    )
