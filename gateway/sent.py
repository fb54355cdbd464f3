"""What this ingress sent where, for policies that know no more than that (`routing.policies`, reads = mirror)."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.fleet import Fleet
from routing.mirror import Mirror
from routing.policies import PolicySpec
from routing.types import ReplicaState, RouteRequest


class SentPrompts:
    """A mirror a model, kept in step with the fleet: a replica that is lost is forgotten at once."""

    def __init__(self, spec: PolicySpec, fleet: Fleet) -> None:
        self._spec = spec
        self._fleet = fleet
        self._mirrors: dict[str, Mirror] = {}
        fleet.subscribe(self._forget_lost)

    def known(self, request: RouteRequest, states: Sequence[ReplicaState]) -> tuple[dict[str, int], dict[str, int]]:
        """Blocks of the request's prompt that each of these replicas was sent, and blocks in all."""
        mirror = self._mirrors.get(request.model)
        if mirror is None:
            mirror = self._mirrors[request.model] = Mirror()
        for state in states:
            if state.replica_id not in mirror:
                kv_tokens = state.num_blocks * state.block_size
                mirror.add(state.replica_id, self._spec.mirror_blocks(request.block_tokens, kv_tokens))
        return mirror.match(request.block_hashes), mirror.held_blocks()

    def placed(self, request: RouteRequest, replica_id: str) -> None:
        """A request went there."""
        self._mirrors[request.model].insert(replica_id, request.block_hashes)

    def _forget_lost(self, model_id: str) -> None:
        mirror = self._mirrors.get(model_id)
        if mirror is not None:
            connected = {state.replica_id for state in self._fleet.states(model_id)}
            for replica_id in mirror.held_blocks().keys() - connected:
                mirror.drop(replica_id)
