"""What a replica would cost a request: expected seconds to its first token, and the harm done to others.

One unit for everything. Rates are learnt by each replica; where one candidate lacks a rate, all are weighed with the
same assumed one, since a guess beside a measurement would decide by ignorance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from routing.placement import adapter_wait_s, stray_s
from routing.types import ReplicaState, RouteRequest
from routing.waiting import ahead_and_behind

PRIOR_PREFILL_TOKENS_PER_S = 2000.0
"""Assumed while no candidate has computed a prompt yet."""

PRIOR_STEP_TIME_S = 0.02
"""Assumed while no candidate has made a step with only decodes yet."""

MEAN_OUTPUT_TOKENS = 128
"""How long a sequence is assumed to hold its place, for what comes beyond `max_num_seqs`."""


@dataclass(frozen=True, slots=True)
class Harm:
    """What a second of a request's own prefill costs everybody else, in seconds.

    `to_come`: all who arrive while the replica is busy with it, and those whose cached blocks it evicts. `waiting`:
    each of the pending prompts that it goes before, where the replica prefills the shortest first. Capacity is flat
    around these values on every trace tried (1 to 4, and 0.2 to 1, within 2 %).
    """

    to_come: float = 2.0
    waiting: float = 0.5


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds and rates to weigh with: one value for all replicas where any lacks its own, else None (each its own)."""

    prefill_tokens_per_s: float | None
    step_time_s: float | None


@dataclass(frozen=True, slots=True)
class Weights:
    """What is the same for all candidates of one decision. `homes`: see `Snapshot.homes`."""

    rates: Rates
    harm: Harm
    homes: tuple[str, ...] = ()


def comparable_rates(replicas: Sequence[ReplicaState]) -> Rates:
    """Which signals every replica has; a missing one is replaced, for all, by the median of those known."""
    prefill = [r.prefill_tokens_per_s for r in replicas if r.prefill_tokens_per_s > 0]
    step = [r.step_time_s for r in replicas if r.step_time_s > 0]
    return Rates(
        prefill_tokens_per_s=_shared(prefill, len(replicas), PRIOR_PREFILL_TOKENS_PER_S),
        step_time_s=_shared(step, len(replicas), PRIOR_STEP_TIME_S),
    )


def _shared(known: Sequence[float], num_replicas: int, prior: float) -> float | None:
    if len(known) == num_replicas:
        return None
    return median(known) if known else prior


def matched_tokens(request: RouteRequest, num_blocks: int) -> int:
    """Prompt tokens that `num_blocks` cached blocks save; the last token is computed in any case."""
    return min(num_blocks * request.block_tokens, request.num_prompt_tokens - 1)


def terms(request: RouteRequest, replica: ReplicaState, matched: int, weights: Weights) -> dict[str, float]:
    """Expected seconds, by term, of running `request` there when `matched` of its prompt tokens are cached.

    What it waits itself: queue: pending prompt tokens that go before it in the replica's own order. prefill: its own
    uncached tokens. decode: the running requests' share of each step until it is through. places: for one of
    `max_num_seqs` to end. memory: for KV blocks to be freed. adapter: for its LoRA adapter.
    What others wait: harm: for its prefill. crowding: slower steps for those who decode there. stray: for adapters that
    must make room, when it does not go where its adapter lives.
    """
    rates, harm = weights.rates, weights.harm
    rate = rates.prefill_tokens_per_s or replica.prefill_tokens_per_s
    own = request.num_prompt_tokens - matched
    if replica.prefill_order == "shortest":
        ahead, behind = ahead_and_behind(replica.waiting_sizes, own, "shortest")
    else:
        ahead, behind = replica.num_waiting_tokens + replica.num_sent_tokens, 0.0
    own_s = own / rate
    found = {"queue": ahead / rate, "prefill": own_s, "harm": (harm.to_come + harm.waiting * behind) * own_s}
    num_busy = replica.num_running + replica.num_waiting + replica.num_sent
    if num_busy:
        step_s = rates.step_time_s or replica.step_time_s
        found["decode"] = step_s * (1 + (ahead + own) // replica.max_num_batched_tokens)
        found["crowding"] = step_s * num_busy / replica.max_num_seqs
        if num_busy >= replica.max_num_seqs:
            num_before = num_busy + 1 - replica.max_num_seqs
            found["places"] = num_before * MEAN_OUTPUT_TOKENS * step_s / replica.max_num_seqs
        short_tokens = ahead + own - replica.num_free_blocks * replica.block_size
        if short_tokens > 0 and replica.num_blocks:
            found["memory"] = short_tokens / rate
    if request.adapter is not None:
        found["adapter"] = adapter_wait_s(request, replica)
        found["stray"] = stray_s(request, replica, weights.homes)
    return found
