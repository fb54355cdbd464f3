"""The policy `warm`: the least expected seconds to the first token, the harm done to others included.

Hits, queues, adapters and harm are weighed in one unit (`routing.cost`), so there is no threshold to tune: a cold
replica wins as soon as waiting for the warm one costs more than computing the prompt again, for all concerned.
"""

from __future__ import annotations

from routing.cost import Harm, Weights, comparable_rates, terms
from routing.policy import TIE_S, Policy, rendezvous, split
from routing.types import Candidate, Decision, RouteRequest, Snapshot


def warm_with(name: str, harm: Harm) -> Policy:
    """The policy with these weights, under this name.

    Among equals the prompt's first block decides (rendezvous hashing, Thaler and Ravishankar 1998), so that separate
    ingresses warm the same replica.
    """

    def decide(request: RouteRequest, snapshot: Snapshot) -> Decision:
        refused, fit = split(request, snapshot.replicas)
        if not fit:
            return Decision(request.request_id, name, None, tuple(refused), "no replica can take it")
        weights = Weights(*comparable_rates(fit), harm.to_come, harm.waiting, snapshot.homes)
        matched_blocks, block_tokens = snapshot.matched_blocks, request.block_tokens
        most = request.num_prompt_tokens - 1  # the last token is computed in any case
        weighed = []
        costs = []
        for replica in fit:
            matched = matched_blocks.get(replica.replica_id, 0) * block_tokens
            if matched > most:
                matched = most
            seconds = terms(request, replica, matched, weights)
            weighed.append(Candidate(replica.replica_id, matched, seconds))
            costs.append(sum(seconds))
        bound = min(costs) + TIE_S
        best = [c for c, cost in zip(weighed, costs, strict=True) if cost <= bound]
        winner = best[0] if len(best) == 1 else rendezvous(request, best)
        reason = "least expected cost" if len(best) == 1 else f"first block's choice among {len(best)} equal"
        return Decision(request.request_id, name, winner.replica_id, (*weighed, *refused), reason)

    return decide


warm = warm_with("warm", Harm())
