"""Which replica gets a job: prefix hashes, a snapshot of the fleet, the profile's policy; and why, for who asks."""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache

from configs.schema import RoutingConfig
from gateway.fleet import Fleet
from gateway.slot import Surroundings
from gateway.types import Job
from routing.cost import matched_tokens
from routing.policies import POLICIES
from routing.prefix import Namespace, block_hashes
from routing.types import Decision, RouteRequest, Snapshot

MAX_DECISIONS = 512


class Router:
    """Decides for one ingress. Decisions are kept for a while, by request id."""

    def __init__(self, fleet: Fleet, config: RoutingConfig, around: Surroundings) -> None:
        self._fleet = fleet
        self.max_attempts = config.max_attempts
        self._around = around
        self._policy = POLICIES[config.policy]
        self._num_decisions = 0
        self._kept: OrderedDict[str, Decision] = OrderedDict()
        metrics = around.metrics
        self._observe_s = metrics.decision_seconds.labels(config.policy).observe
        self._count_placed = lru_cache(4096)(lambda replica_id: metrics.decisions.labels(config.policy, replica_id).inc)
        self._count_tokens = lru_cache(4096)(lambda model_id, kind: metrics.routed_tokens.labels(model_id, kind).inc)

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
        )

    def num_uncached(self, request: RouteRequest) -> int:
        """Prompt tokens that the warmest replica would have to compute."""
        matched = max(self._fleet.index.match(request.block_hashes).values(), default=0)
        return request.num_prompt_tokens - matched_tokens(request, matched)

    def decide(self, request: RouteRequest) -> Decision:
        """Weighs the replicas of the request's model as they are now, and keeps the decision."""
        began = self._around.clock()
        snapshot = Snapshot(
            replicas=self._fleet.states(request.model),
            matched_blocks=self._fleet.index.match(request.block_hashes),
            turn=self._num_decisions,
            draw=self._around.random.random(),
        )
        decision = self._policy(request, snapshot)
        self._num_decisions += 1
        self._kept[request.request_id] = decision
        if len(self._kept) > MAX_DECISIONS:
            self._kept.popitem(last=False)
        self._observe_s(self._around.clock() - began)
        return decision

    def placed(self, request: RouteRequest, decision: Decision) -> None:
        """The request went where the decision says: its prompt will be warm there."""
        winner = decision.winner
        assert winner is not None, f"{request.request_id} was placed nowhere"
        self._fleet.index.insert(winner.replica_id, request.block_hashes)
        self._count_placed(winner.replica_id)()
        self._count_tokens(request.model, "prompt")(request.num_prompt_tokens)
        self._count_tokens(request.model, "matched")(winner.matched_tokens)

    def decision(self, request_id: str) -> Decision | None:
        """The last decision about a recent request."""
        return self._kept.get(request_id)
