"""What a replica would cost a request: expected seconds to its first token, and the harm done to others.

One unit for everything. Rates are learnt by each replica; where one candidate lacks a rate, all are weighed with the
same assumed one, since a guess beside a measurement would decide by ignorance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from routing.types import ReplicaState, RouteRequest

PRIOR_PREFILL_TOKENS_PER_S = 2000.0
"""Assumed while no candidate has computed a prompt yet."""

PRIOR_STEP_TIME_S = 0.02
"""Assumed while no candidate has made a step with only decodes yet."""

MEAN_OUTPUT_TOKENS = 128
"""How long a sequence is assumed to hold its place, for what comes beyond `max_num_seqs`."""

HARM = 2.0
"""Those who come after wait for this request's uncached prompt too: it counts 1 + HARM times.

2 to 4 was best on every trace tried in a simulator, for replicas that prefill first come, first served.
"""


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds and rates to weigh with: one value for all replicas where any lacks its own, else None (each its own)."""

    prefill_tokens_per_s: float | None
    step_time_s: float | None


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


def terms(request: RouteRequest, replica: ReplicaState, matched: int, rates: Rates) -> dict[str, float]:
    """Expected seconds, by term, of running `request` there when `matched` of its prompt tokens are cached.

    queue: prompt tokens ahead. decode: the running requests' share of each step until ours is through. prefill: our own
    uncached tokens. places: waiting for one of `max_num_seqs` to end. memory: KV blocks that must be freed first.
    crowding: slower steps for those who decode there. harm: our prefill, as those behind us feel it.
    """
    rate = rates.prefill_tokens_per_s or replica.prefill_tokens_per_s
    step_s = rates.step_time_s or replica.step_time_s
    own = request.num_prompt_tokens - matched
    ahead = replica.num_waiting_tokens + replica.num_sent_tokens
    num_busy = replica.num_running + replica.num_waiting + replica.num_sent
    found = {"queue": ahead / rate, "prefill": own / rate, "harm": HARM * own / rate}
    if num_busy:
        found["decode"] = step_s * (1 + (ahead + own) // replica.max_num_batched_tokens)
        found["crowding"] = step_s * num_busy / replica.max_num_seqs
        if num_busy >= replica.max_num_seqs:
            num_before = num_busy + 1 - replica.max_num_seqs
            found["places"] = num_before * MEAN_OUTPUT_TOKENS * step_s / replica.max_num_seqs
        short_tokens = ahead + own - replica.num_free_blocks * replica.block_size
        if short_tokens > 0 and replica.num_blocks:
            found["memory"] = short_tokens / rate
    return found
