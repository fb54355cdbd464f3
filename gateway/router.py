"""Which replica gets a job: prefix hashes, a snapshot of the fleet, the profile's policy; and why, for who asks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import msgspec

from configs.schema import RoutingConfig
from gateway.decisions import DecisionLog
from gateway.fleet import Fleet
from gateway.homes import AdapterHomes
from gateway.placement import Reserved
from gateway.sent import SentPrompts
from gateway.slot import Surroundings
from gateway.types import Job
from routing.cost import matched_tokens
from routing.placement import adapter_wait_s
from routing.policies import POLICIES
from routing.prefix import Namespace, block_hashes
from routing.types import Decision, ReplicaState, RouteRequest, Snapshot


class Router:
    """Decides for one ingress, and keeps every decision in `log`."""

    def __init__(self, fleet: Fleet, config: RoutingConfig, around: Surroundings, log: DecisionLog) -> None:
        self.log = log
        self._fleet = fleet
        self.max_attempts = config.max_attempts
        self._around = around
        self._spec = POLICIES[config.policy]
        self._sent = SentPrompts(self._spec, fleet) if self._spec.reads == "mirror" else None
        self._homes = AdapterHomes(fleet.states, around.clock)
        self._num_decisions = 0
        metrics = around.metrics
        self._observe_s = metrics.decision_seconds.labels(config.policy).observe
        self._count_placed = lru_cache(4096)(lambda replica_id: metrics.decisions.labels(config.policy, replica_id).inc)
        self._count_tokens = lru_cache(4096)(lambda model_id, kind: metrics.routed_tokens.labels(model_id, kind).inc)

    @property
    def weighs_seconds(self) -> bool:
        """See `routing.policies.PolicySpec`."""
        return self._spec.weighs_seconds

    def request(self, job: Job) -> RouteRequest:
        """The job as routing sees it: its prompt hashed."""
        model = job.model
        return RouteRequest(
            request_id=job.request_id,
            model=model.id,
            adapter=job.adapter,
            block_hashes=block_hashes(job.prompt, model.route_block_tokens, Namespace(model.id, job.adapter, job.salt)),
            block_tokens=model.route_block_tokens,
            num_prompt_tokens=job.num_prompt_tokens,
            max_new_tokens=job.sampling.max_tokens,
            tenant=job.tenant.tenant_id,
            adapter_rank=job.adapter_rank,
        )

    def num_uncached(self, request: RouteRequest) -> int:
        """Prompt tokens that the warmest replica would have to compute."""
        matched = max(self._fleet.index.match(request.block_hashes).values(), default=0)
        return request.num_prompt_tokens - matched_tokens(request, matched)

    def prefetch(self, request: RouteRequest) -> None:
        """The request has to wait: its adapter's home may load it meanwhile, unless some replica has it."""
        if request.adapter is None:
            return
        states = {s.replica_id: s for s in self._fleet.states(request.model) if not s.draining and not s.breaker_open}
        if any(adapter_wait_s(request, s) == 0 or _is_loading(request, s) for s in states.values()):
            return
        home = next((replica_id for replica_id in self._homes.of(request) if replica_id in states), None)
        if home is not None:
            self._fleet.prefetch(home, request.adapter)

    def decide(self, request: RouteRequest, attempt: int = 1) -> Decision:
        """Weighs the replicas of the request's model as they are now, and keeps the decision."""
        began = self._around.clock()
        snapshot = self.snapshot(request)
        decision = self._spec.decide(request, snapshot)
        self._num_decisions += 1
        self.log.add(request, decision, attempt, snapshot.replicas)
        self._observe_s(self._around.clock() - began)
        return decision

    @property
    def now(self) -> float:
        return self._around.clock()

    def states(self, model_id: str) -> tuple[ReplicaState, ...]:
        """The replicas of a model as they are believed to be."""
        return self._fleet.states(model_id)

    def prefill_tokens_per_s(self, model_id: str) -> float:
        """How fast a replica of the model computes prompts; 0 while none knows."""
        return self._fleet.prefill_tokens_per_s(model_id)

    def weigh(self, request: RouteRequest, replicas: tuple[ReplicaState, ...]) -> Decision:
        """Weighs these replicas, and keeps nothing: see `used`."""
        began = self._around.clock()
        decision = self._spec.decide(request, msgspec.structs.replace(self.snapshot(request), replicas=replicas))
        self._num_decisions += 1
        self._observe_s(self._around.clock() - began)
        return decision

    def used(self, request: RouteRequest, decision: Decision, attempt: int = 1) -> None:
        """The request goes where a decision of `weigh` says: it is kept."""
        self.log.add(request, decision, attempt, self._fleet.states(request.model))

    def reserve(self, request: RouteRequest, decision: Decision) -> Reserved | None:
        """Keeps the place for a request that is about to be sent; those after it may find its prompt warm there."""
        winner = decision.winner
        if winner is None:
            return None
        self._fleet.index.sent(winner.replica_id, request.block_hashes, self._around.clock())
        return self._fleet.reserve(winner.replica_id, request.num_prompt_tokens - winner.matched_tokens)

    def placed(self, request: RouteRequest, decision: Decision) -> None:
        """The request went where the decision says: its prompt will be warm there."""
        winner = decision.winner
        assert winner is not None, f"{request.request_id} was placed nowhere"
        self._fleet.index.sent(winner.replica_id, request.block_hashes, self._around.clock())
        self._homes.placed(request, request.num_prompt_tokens - winner.matched_tokens)
        if self._sent is not None:
            self._sent.placed(request, winner.replica_id)
        self._count_placed(winner.replica_id)()
        self._count_tokens(request.model, "prompt")(request.num_prompt_tokens)
        self._count_tokens(request.model, "matched")(winner.matched_tokens)

    def snapshot(self, request: RouteRequest) -> Snapshot:
        """What the policy may know now, from where it reads it."""
        states = self._fleet.states(request.model)
        matched: Mapping[str, int] = {}
        held: Mapping[str, int] = {}
        if self._sent is not None:
            matched, held = self._sent.known(request, states)
        elif self._spec.reads == "events":
            matched = self._fleet.index.match(request.block_hashes)
        guessed = self._fleet.index.guessed
        draw = self._around.random.random()
        homes = self._homes.of(request)
        return Snapshot(states, matched, self._num_decisions, draw, held, homes, guessed)


def _is_loading(request: RouteRequest, replica: ReplicaState) -> bool:
    return any(name == request.adapter for name, _ in replica.loading)
