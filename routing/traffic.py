"""Replica states made of what one router sent: for routers that replicas push nothing to.

Queue lengths come from outside; how many prompt tokens wait there is reckoned: what was sent and not cached, worked
off at the replica's prefill rate. What a replica tells of itself (`STATS`) replaces what would be guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgspec

from routing.cost import PRIOR_PREFILL_TOKENS_PER_S
from routing.mirror import Mirror
from routing.policies import PolicySpec
from routing.types import Candidate, Decision, ReplicaState, RouteRequest, Snapshot

STATS = (
    "num_waiting", "num_waiting_tokens", "num_free_blocks", "num_blocks", "block_size", "prefill_tokens_per_s",
    "step_time_s", "max_num_seqs", "max_num_batched_tokens", "prefill_order",
)  # fmt: skip
"""Fields of `ReplicaState` that a replica may tell about itself."""

MAX_MODEL_LEN = 1 << 40
"""Prompts are not measured exactly here: the replica itself refuses one that is too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficOptions:
    """`kv_tokens`: what a replica's KV cache holds, unless it tells. `prefill_tokens_per_s`: likewise."""

    kv_tokens: int = 500_000
    prefill_tokens_per_s: float = PRIOR_PREFILL_TOKENS_PER_S
    max_num_seqs: int = 256
    max_adapters: int = 1024


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a replica at this moment. `num_ongoing`: requests there; `told`: `STATS` it told, if any."""

    replica_id: str
    num_ongoing: int
    adapters: tuple[str, ...] = ()
    full: bool = False
    told: Mapping[str, Any] = field(default_factory=dict)


class _Backlog:
    """Uncached prompt tokens sent to a replica and, by its rate, not yet computed."""

    __slots__ = ("_at", "_tokens")

    def __init__(self, now: float) -> None:
        self._tokens = 0.0
        self._at = now

    def at(self, now: float, tokens_per_s: float) -> int:
        self._tokens = max(0.0, self._tokens - (now - self._at) * tokens_per_s)
        self._at = now
        return round(self._tokens)

    def add(self, num_tokens: int) -> None:
        self._tokens += num_tokens


class OwnTraffic:
    """Decides by a policy of the table, knowing no more than this router's own traffic.

    `clock` in seconds, monotonic. One of these serves one model's replicas.
    """

    def __init__(self, spec: PolicySpec, options: TrafficOptions, clock: Callable[[], float], random: Random) -> None:
        self._spec = spec
        self._options = options
        self._clock = clock
        self._random = random
        self._mirror = Mirror()
        self._backlogs: dict[str, _Backlog] = {}
        self._num_decisions = 0

    def decide(self, request: RouteRequest, replicas: Sequence[Seen]) -> Decision:
        """Weighs these replicas for the request."""
        self._num_decisions += 1
        for seen in replicas:
            if seen.replica_id not in self._mirror:
                max_blocks = self._spec.mirror_blocks(request.block_tokens, self._options.kv_tokens)
                self._mirror.add(seen.replica_id, max_blocks)
        reads = self._spec.reads != "none"
        snapshot = Snapshot(
            replicas=tuple([self._state(request.model, seen) for seen in replicas]),
            matched_blocks=self._mirror.match(request.block_hashes) if reads else {},
            turn=self._num_decisions,
            draw=self._random.random(),
            held_blocks=self._mirror.held_blocks() if reads else {},
        )
        return self._spec.decide(request, snapshot)

    def sent(self, request: RouteRequest, decision: Decision, replica_id: str) -> None:
        """The request went there, which need not be where the decision said."""
        chosen = next((c for c in decision.candidates if c.replica_id == replica_id), Candidate(replica_id))
        self._mirror.insert(replica_id, request.block_hashes)
        self._backlog(replica_id).add(request.num_prompt_tokens - chosen.matched_tokens)

    def keep(self, replica_ids: Sequence[str]) -> None:
        """Forgets every replica but these."""
        for replica_id in self._mirror.held_blocks().keys() - set(replica_ids):
            self._mirror.drop(replica_id)
            self._backlogs.pop(replica_id, None)

    def _backlog(self, replica_id: str) -> _Backlog:
        return self._backlogs.setdefault(replica_id, _Backlog(self._clock()))

    def _state(self, model: str, seen: Seen) -> ReplicaState:
        options = self._options
        told = {name: value for name, value in seen.told.items() if name in STATS}
        rate = float(told.get("prefill_tokens_per_s") or options.prefill_tokens_per_s)
        waiting = self._backlog(seen.replica_id).at(self._clock(), rate) if seen.num_ongoing else 0
        state = ReplicaState(
            replica_id=seen.replica_id,
            model=model,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=options.max_num_seqs,
            num_running=max(0, seen.num_ongoing - int(told.get("num_waiting", 0))),
            num_waiting_tokens=waiting,
            prefill_tokens_per_s=rate,
            adapters=seen.adapters,
            max_adapters=options.max_adapters,
            full=seen.full,
        )
        return msgspec.structs.replace(state, **told)
