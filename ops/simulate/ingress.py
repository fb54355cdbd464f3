"""One ingress on a virtual clock: the gateway's fair queue, a view of the replicas, a policy, a binding.

arrival ─► fair queue ─ binding ─► policy ─► slot ─► replica
              ▲                      ▲
              └─── pushes (late) ────┴── KV events (late)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import msgspec

from configs.schema import ModelConfig
from gateway.fair_queue import FairQueue
from gateway.slot import Sent
from gateway.types import Job, Tenant
from ops.simulate.binding import Bound, Waiting
from ops.simulate.fleet import FleetSpec
from ops.simulate.link import MODEL
from ops.simulate.replica import SimReplica
from ops.simulate.trace import TraceRequest
from ops.simulate.view import View
from replicas.contract import GenerateRequest, SamplingParams
from routing.ageing import Dues
from routing.cost import PRIOR_PREFILL_TOKENS_PER_S, matched_tokens
from routing.policies import PolicySpec
from routing.types import Decision, ReplicaState, RouteRequest

MAX_TOKENS = 4096
"""What clients are taken to ask for at most: how long an answer will be is not known when it is routed."""

_SAMPLING = SamplingParams(max_tokens=MAX_TOKENS, seed=0)
_MODEL = ModelConfig(id=MODEL, source="sim:bytes")


@dataclass(frozen=True, slots=True)
class Placed:
    """A request on its way: where it went, and what must be settled when it answers and ends."""

    bound: Bound
    replica: int
    sent: Sent

    @property
    def index(self) -> int:
        return self.bound.waiting.index


class Ingress:
    """Implements `ops.simulate.binding.Binder`. `clock`: the virtual time."""

    def __init__(
        self, policy: PolicySpec, spec: FleetSpec, replicas: list[SimReplica], clock: Callable[[], float]
    ) -> None:
        self.queue: FairQueue[Waiting] = FairQueue()
        self.view = View(policy, spec, replicas, clock)
        self._policy = policy
        self.look_at = inf
        self._binding = spec.new_binding()
        self._dues = Dues() if spec.look_ahead else None
        self._clock = clock
        self._block_tokens = replicas[0].cache.block_tokens
        self._tenants: dict[str, Tenant] = {}
        self._just_come: dict[int, RouteRequest] = {}

    def arrive(self, index: int, request: TraceRequest) -> None:
        """A request joins the queue."""
        route = RouteRequest(
            request_id=str(index),
            model=MODEL,
            adapter=request.adapter,
            block_hashes=request.blocks,
            block_tokens=self._block_tokens,
            num_prompt_tokens=request.num_prompt,
            max_new_tokens=MAX_TOKENS,
            tenant=request.tenant,
            adapter_rank=request.adapter_rank,
        )
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            tenant = self._tenants[request.tenant] = Tenant(request.tenant, b"")
        job = Job(route.request_id, _MODEL, tenant, b"", _SAMPLING, b"", request.adapter)
        self.view.look()
        matched = max(self.view.matched(route).values(), default=0)
        num_uncached = request.num_prompt - matched_tokens(route, matched)
        now = self._clock()
        due = now
        if self._dues is not None:
            rate = self.view.prefill_tokens_per_s or PRIOR_PREFILL_TOKENS_PER_S
            due = self._dues.due(now, num_uncached, rate)
        self.queue.push(Waiting(index, job, route, num_uncached, now, due), due)
        if route.adapter is not None:
            self._just_come[index] = route

    def bind(self) -> Placed | None:
        """Sends the next request to its replica; None when none can go before `look_at`. Call `view.look` before."""
        self.look_at = inf
        bound = self._binding(self)
        if bound is None:
            for waits in self._just_come.values():
                self.view.prefetch(waits)
            self._just_come.clear()
            return None
        self._just_come.pop(bound.waiting.index, None)
        winner = bound.decision.winner
        assert winner is not None, f"no replica can take request {bound.waiting.index}: {bound.decision}"
        route = bound.waiting.route
        attempt = GenerateRequest(
            request_id=route.request_id,
            prompt=b"",
            sampling=_SAMPLING,
            fair_tag=bound.charge.tag,
            adapter=route.adapter,
            tenant=route.tenant,
        )
        number = self.view.number[winner.replica_id]
        sent = self.view.sent(route, attempt, (number, route.num_prompt_tokens - winner.matched_tokens))
        return Placed(bound, number, sent)

    def answered(self, placed: Placed) -> None:
        """Its first token came."""
        self.view.slots[placed.replica].slot.arrived(placed.sent)

    def ended(self, placed: Placed, num_uncached: int, num_output: int) -> None:
        """It is over: its tenant is charged what was used."""
        slot = self.view.slots[placed.replica].slot
        slot.num_in_flight -= 1
        slot.changed()
        self.queue.settle(placed.bound.charge, num_uncached, num_output)

    def has_place(self) -> bool:
        return self.view.has_place()

    def states(self) -> tuple[ReplicaState, ...]:
        return self.view.states()

    @property
    def now(self) -> float:
        return self._clock()

    def look_again(self, at: float) -> None:
        self.look_at = at

    def weigh(self, route: RouteRequest, replicas: tuple[ReplicaState, ...]) -> Decision:
        snapshot = self.view.snapshot(route)
        return self._policy.decide(route, msgspec.structs.replace(snapshot, replicas=replicas))

    def decide(self, route: RouteRequest) -> Decision:
        return self._policy.decide(route, self.view.snapshot(route))
