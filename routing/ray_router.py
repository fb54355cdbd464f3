"""Warmgate's policies as a Ray Serve request router: prefix- and adapter-aware routing for any Serve deployment.

    RequestRouterConfig(request_router_class="routing.ray_router:WarmgateRouter", request_router_kwargs={…})

For those who run `ray.serve.llm` or a deployment of their own and want the routing alone. It runs inside every handle
(proxy or caller), so it sees its own traffic and Serve's queue lengths, not the pushed state and KV events of a whole
Warmgate: prompts are matched against a mirror of what it sent (`routing.traffic`). A replica that defines
`record_routing_stats` and returns fields named in `routing.traffic.STATS` is weighed by those.

Serve pickles this module by value, with every object its functions name: they name functions and classes only.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from random import Random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from configs.schema import RoutingConfig
from routing.policies import policy_named
from routing.prefix import TOKEN_BYTES, Namespace, block_hashes
from routing.request_text import field_of, prompt_bytes
from routing.traffic import OwnTraffic, Seen, TrafficOptions
from routing.types import Decision, RouteRequest

MAX_UNDER_WAY = 4096
"""Decisions kept until their request is on its way; beyond it the oldest are forgotten."""

OUTPUT_TOKENS = 128
"""Assumed where a request names no `max_tokens`."""


class WarmgateRouter(RequestRouter):
    """Chooses a replica by a policy of `routing.policies`; when that one is full, the shortest queue among the rest.

    Not FIFO: a replica chosen for one request's prefix is of no use to another request.
    """

    def initialize_state(self, policy: str = RoutingConfig().policy, block_tokens: int = 64, **options: Any) -> None:
        """Called by Serve with `request_router_kwargs`: `policy`, `block_tokens` and the fields of `TrafficOptions`.

        Raises ValueError for a policy that does not exist, TypeError for an option that does not.
        """
        self._block_tokens = block_tokens
        self._traffic = OwnTraffic(policy_named(policy), TrafficOptions(**options), time.monotonic, Random())
        self._under_way: OrderedDict[str, tuple[RouteRequest, Decision]] = OrderedDict()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The policy's choice, then all others."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        request = self._request(pending_request)
        decision = self._traffic.decide(request, [self._seen(replica) for replica in candidate_replicas])
        if decision.replica_id is not None and request.request_id not in self._under_way:
            self._traffic.sent(request, decision, decision.replica_id)  # at once: a burst must see what it does
        self._under_way[request.request_id] = (request, decision)
        if len(self._under_way) > MAX_UNDER_WAY:
            self._under_way.popitem(last=False)
        chosen = [r for r in candidate_replicas if r.replica_id.to_full_id_str() == decision.replica_id]
        return [chosen, [r for r in candidate_replicas if r not in chosen]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Serve sent the request there: not where it was chosen to go, if that one was full."""
        known = self._under_way.pop(pending_request.metadata.internal_request_id, None)
        if known is not None and known[1].replica_id != replica_id.to_full_id_str():
            self._traffic.sent(*known, replica_id.to_full_id_str())

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._keep()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._keep()

    def _keep(self) -> None:
        self._traffic.keep([replica_id.to_full_id_str() for replica_id in self.curr_replicas])

    def _seen(self, replica: RunningReplica) -> Seen:
        num_ongoing = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return Seen(
            replica_id=replica.replica_id.to_full_id_str(),
            num_ongoing=num_ongoing,
            adapters=tuple(sorted(replica.multiplexed_model_ids)),
            full=num_ongoing >= replica.max_ongoing_requests,
            told=replica.routing_stats or {},
        )

    def _request(self, pending: PendingRequest) -> RouteRequest:
        model = str(self._deployment_id)
        adapter = pending.metadata.multiplexed_model_id or None
        arguments = (*pending.args, *pending.kwargs.values())
        prompt = prompt_bytes(arguments)
        return RouteRequest(
            request_id=pending.metadata.internal_request_id,
            model=model,
            adapter=adapter,
            block_hashes=block_hashes(prompt, self._block_tokens, Namespace(model, adapter)),
            block_tokens=self._block_tokens,
            num_prompt_tokens=max(1, len(prompt) // TOKEN_BYTES),
            max_new_tokens=next(filter(None, (field_of(a, "max_tokens") for a in arguments)), OUTPUT_TOKENS),
        )
