"""Least estimated time to first token, from exact KV events: queue plus own uncached prompt, nothing else.

The cache-aware prefill scheduling of Mooncake (Qin et al., FAST 2025, algorithm 1) without its KV transfers; no
parameters. It is greedy: what the request does to those behind it costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from routing.baselines.rule import Choice, drawn, policy
from routing.cost import comparable_rates, matched_tokens
from routing.types import ReplicaState, RouteRequest, Snapshot


def _pick(request: RouteRequest, snapshot: Snapshot, fit: Sequence[ReplicaState]) -> Choice:
    shared_rate, _ = comparable_rates(fit)
    seconds = []
    for replica in fit:
        own = request.num_prompt_tokens - matched_tokens(request, snapshot.matched_blocks.get(replica.replica_id, 0))
        ahead = replica.num_waiting_tokens + replica.num_sent_tokens
        seconds.append((ahead + own) / (shared_rate or replica.prefill_tokens_per_s))
    soonest = min(seconds)
    best = [r for r, wait_s in zip(fit, seconds, strict=True) if wait_s == soonest]
    return drawn(best, snapshot.draw), f"first token expected in {soonest:.3f} s"


greedy_ttft = policy("greedy_ttft", _pick)
