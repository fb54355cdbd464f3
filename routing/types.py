"""What routing knows: snapshots, never engines. All times in seconds, all sizes in tokens unless the name says so.

Structs rather than dataclasses: a decision over 64 replicas makes as many, at a sixth of the cost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from routing.waiting import NOBODY, Pending

TERMS = ("queue", "prefill", "harm", "decode", "crowding", "places", "memory", "adapter", "stray")
"""What a replica costs a request, in this order; `routing.cost.terms` says what each is."""

NUM_ALWAYS = 3
"""Terms that every weighed candidate has; of the others those that do not apply are 0, or missing at the end."""

NUM_WITHOUT_ADAPTER = 7


class RouteRequest(msgspec.Struct, frozen=True):
    """One request as routing sees it. `block_hashes`: chained prefix hashes, one per full routing block.

    `excluded`: replicas that already failed this request. `adapter_rank`: what the adapter's load time grows with.
    """

    request_id: str
    model: str
    adapter: str | None
    block_hashes: tuple[int, ...]
    block_tokens: int
    num_prompt_tokens: int
    max_new_tokens: int
    tenant: str = ""
    excluded: frozenset[str] = frozenset()
    adapter_rank: int = 8


class ReplicaState(msgspec.Struct, frozen=True):
    """A replica at one moment, as this ingress believes it: the last pushed state plus what was sent since.

    `num_sent` / `num_sent_tokens`: requests and uncached prompt tokens this ingress sent that the pushed state
    cannot contain yet. `full`: it has as many requests as it should; to be chosen only when all are full.
    `wanted_tokens`: prompt tokens it wants pending before a newcomer, and no more; 0 = it does not say. Where it does,
    `num_places` is how many requests more it can take, and `turn` how many other ingresses may send theirs first.
    `pending`: prompts waiting or partly computed there, those this ingress sent included, by size; of use where the
    order goes by size, and empty elsewhere (see `routing.waiting`).
    `adapters` (a set where many are asked for) are resident; `loading`, `adapter_queue_s`, `adapter_load_s` as in
    `replicas.contract.EngineStats`, loads that this ingress asked for since included.
    """

    replica_id: str
    model: str
    max_model_len: int
    max_num_seqs: int
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    block_size: int = 16
    prefill_tokens_per_s: float = 0.0
    step_time_s: float = 0.0
    adapters: Collection[str] = ()
    max_adapters: int = 0
    num_sent: int = 0
    num_sent_tokens: int = 0
    draining: bool = False
    breaker_open: bool = False
    prefill_order: str = "fcfs"
    max_num_batched_tokens: int = 512
    full: bool = False
    wanted_tokens: int = 0
    num_places: int = 0
    turn: int = 0
    pending: Pending = NOBODY
    loading: tuple[tuple[str, float], ...] = ()
    adapter_load_s: float = 0.0
    adapter_queue_s: float = 0.0


class Snapshot(msgspec.Struct, frozen=True):
    """All a policy may know besides the request: every replica of its model, and what the index says of the prompt.

    `matched_blocks`: leading routing blocks of the prompt a replica probably holds, by replica id (absent = none).
    `held_blocks`: all blocks the index has of a replica, filled for those who read a mirror (`routing.policies`).
    `guessed`: replicas whose matched blocks are no word of theirs, but inferred from what was sent to them.
    `turn` counts the decisions before this one, `draw` is uniform in [0, 1): a policy has no state and no randomness
    of its own. `homes`: replicas where the request's adapter should live, by demand (`routing.placement`).
    """

    replicas: tuple[ReplicaState, ...]
    matched_blocks: Mapping[str, int] = {}
    turn: int = 0
    draw: float = 0.0
    held_blocks: Mapping[str, int] = {}
    homes: tuple[str, ...] = ()
    guessed: frozenset[str] = frozenset()


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """One replica weighed, or why it was filtered out. `seconds`: see `TERMS`; empty where a policy does not weigh."""

    replica_id: str
    matched_tokens: int = 0
    seconds: tuple[float, ...] = ()
    filtered: str | None = None

    @property
    def cost_s(self) -> float:
        return sum(self.seconds)

    @property
    def terms_s(self) -> dict[str, float]:
        """Seconds by term, of those that apply."""
        return {
            term: seconds
            for i, (term, seconds) in enumerate(zip(TERMS, self.seconds, strict=False))
            if seconds or not NUM_ALWAYS <= i < NUM_WITHOUT_ADAPTER
        }


class Decision(msgspec.Struct, frozen=True):
    """Which replica, and why; `replica_id` is None when every candidate was filtered out."""

    request_id: str
    policy: str
    replica_id: str | None
    candidates: tuple[Candidate, ...]
    reason: str = ""

    @property
    def winner(self) -> Candidate | None:
        return next((c for c in self.candidates if c.replica_id == self.replica_id), None)
