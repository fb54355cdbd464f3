"""What a replica would cost a request: expected seconds to its first token, and the harm done to others.

One unit for everything. Rates are learnt by each replica; where one candidate lacks a rate, all are weighed with the
same assumed one, since a guess beside a measurement would decide by ignorance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import msgspec

from routing.placement import wait_and_stray_s
from routing.types import ReplicaState, RouteRequest
from routing.waiting import SHORTEST

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


class Weights(msgspec.Struct, frozen=True):
    """What is the same for all candidates of one decision.

    `prefill_tokens_per_s`, `step_time_s`: one value for all replicas where any lacks its own, else 0 (each its own).
    `to_come`, `waiting`: see `Harm`. `homes`: see `Snapshot.homes`.
    """

    prefill_tokens_per_s: float
    step_time_s: float
    to_come: float
    waiting: float
    homes: tuple[str, ...] = ()


def comparable_rates(replicas: Sequence[ReplicaState]) -> tuple[float, float]:
    """Prefill tokens/s and step seconds to weigh all with: where every replica has its own, 0; where one lacks it, the
    median of those known."""
    prefill = [r.prefill_tokens_per_s for r in replicas]
    step = [r.step_time_s for r in replicas]
    return (
        0.0 if min(prefill) > 0 else _shared(prefill, PRIOR_PREFILL_TOKENS_PER_S),
        0.0 if min(step) > 0 else _shared(step, PRIOR_STEP_TIME_S),
    )


def _shared(rates: Sequence[float], prior: float) -> float:
    known = [rate for rate in rates if rate > 0]
    return median(known) if known else prior


def matched_tokens(request: RouteRequest, num_blocks: int) -> int:
    """Prompt tokens that `num_blocks` cached blocks save; the last token is computed in any case."""
    return min(num_blocks * request.block_tokens, request.num_prompt_tokens - 1)


def terms(request: RouteRequest, replica: ReplicaState, matched: int, weights: Weights) -> tuple[float, ...]:
    """Expected seconds, by `routing.types.TERMS`, of running `request` there when `matched` of its tokens are cached.

    What it waits itself: queue: pending prompt tokens that go before it in the replica's own order. prefill: its own
    uncached tokens. decode: the running requests' share of each step until it is through. places: for one of
    `max_num_seqs` to end. memory: for KV blocks to be freed. adapter: for its LoRA adapter.
    What others wait: harm: for its prefill. crowding: slower steps for those who decode there. stray: for adapters that
    must make room, when it does not go where its adapter lives.
    """
    rate = weights.prefill_tokens_per_s or replica.prefill_tokens_per_s
    own = request.num_prompt_tokens - matched
    if replica.prefill_order == SHORTEST:
        ahead, behind = replica.pending.ahead_and_behind(own)
    else:
        ahead, behind = replica.num_waiting_tokens + replica.num_sent_tokens, 0.0
    own_s = own / rate
    decode = crowding = places = memory = 0.0
    num_busy = replica.num_running + replica.num_waiting + replica.num_sent
    if num_busy:
        step_s = weights.step_time_s or replica.step_time_s
        max_num_seqs = replica.max_num_seqs
        decode = step_s * (1 + (ahead + own) // replica.max_num_batched_tokens)
        crowding = step_s * num_busy / max_num_seqs
        if num_busy >= max_num_seqs:
            places = (num_busy + 1 - max_num_seqs) * MEAN_OUTPUT_TOKENS * step_s / max_num_seqs
        short_tokens = ahead + own - replica.num_free_blocks * replica.block_size
        if short_tokens > 0 and replica.num_blocks:
            memory = short_tokens / rate
    harm = (weights.to_come + weights.waiting * behind) * own_s
    if request.adapter is None:
        return (ahead / rate, own_s, harm, decode, crowding, places, memory)
    adapter, stray = wait_and_stray_s(request, replica, weights.homes)
    return (ahead / rate, own_s, harm, decode, crowding, places, memory, adapter, stray)
