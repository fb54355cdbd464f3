"""Whether a router chose as a rule would: the rule is asked again, request by request, knowing what the router knew.

Who was where, and for how long, is read off the outcomes of a replay. What the rule may know of that: requests under
way at each replica, and which prompts were sent where, to the character. Names of replicas are shuffled for every
asking, so a rule's own way with equals, or its luck, becomes a probability of each replica:

    explained = mean over requests of p(the replica that it went to) ÷ mean of what a router of that very rule gets

1 = the rule itself; of a rule that leaves nothing to luck: the share of requests that went where it says. This tells
more than a few minutes' latencies, which differ from run to run for any rule that has luck in it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from heapq import heappop, heappush
from random import Random

from ops.bench.replay import Outcome
from ops.bench.trace_slice import ReplayRequest
from replicas.contract import pack_tokens
from routing.mirror import Mirror
from routing.policies import PolicySpec
from routing.prefix import Namespace, block_hashes
from routing.types import ReplicaState, RouteRequest, Snapshot

NUM_ASKED = 48
"""Askings a request, each with its own names and draw."""

MAX_MODEL_LEN = 1 << 40
MODEL = "m"


def explained(
    spec: PolicySpec, requests: Sequence[ReplayRequest], outcomes: Sequence[Outcome], random: Random
) -> float:
    """How much of the choices in `outcomes`, one per request, the rule explains; 1 is all of it.

    0 when nothing was chosen: fewer than two replicas, or no answers.
    """
    chosen = [i for i, outcome in enumerate(outcomes) if outcome.replica and math.isfinite(outcome.ended_s)]
    replicas = sorted({outcomes[i].replica for i in chosen})
    if len(replicas) < 2:
        return 0.0
    asker = _Asker(spec, replicas, random)
    agreed = expected = 0.0
    for i in sorted(chosen, key=lambda i: outcomes[i].left_s):
        outcome = outcomes[i]
        route = _route(requests[i])
        chances = asker.chances(route, outcome.left_s)
        agreed += chances.get(outcome.replica, 0.0)
        expected += sum(chance**2 for chance in chances.values())
        asker.went(route, outcome)
    return agreed / expected


def _route(request: ReplayRequest) -> RouteRequest:
    """A request whose every character is a block."""
    hashes = block_hashes(pack_tokens(list(request.prompt.encode())), 1, Namespace(MODEL))
    return RouteRequest("", MODEL, None, hashes, 1, len(hashes), request.max_tokens)


class _Asker:
    """What a router has seen so far, put to the rule."""

    def __init__(self, spec: PolicySpec, replicas: Sequence[str], random: Random) -> None:
        self._spec = spec
        self._random = random
        self._loads = dict.fromkeys(replicas, 0)
        self._ends: list[tuple[float, str]] = []
        self._mirror = Mirror()
        for replica in replicas:
            self._mirror.add(replica, spec.mirror_blocks(1, MAX_MODEL_LEN))

    def chances(self, route: RouteRequest, now: float) -> dict[str, float]:
        """How likely the rule takes each replica for a request that comes now."""
        while self._ends and self._ends[0][0] <= now:
            self._loads[heappop(self._ends)[1]] -= 1
        matched, held = self._mirror.match(route.block_hashes), self._mirror.held_blocks()
        found: Counter[str] = Counter()
        for turn in range(NUM_ASKED):
            names = [f"{number:03d}" for number in self._random.sample(range(1000), len(self._loads))]
            alias = dict(zip(self._loads, names, strict=True))
            states = [_state(alias[replica], num) for replica, num in self._loads.items()]
            snapshot = Snapshot(
                replicas=tuple(states),
                matched_blocks={alias[replica]: num for replica, num in matched.items()},
                turn=turn,
                draw=self._random.random(),
                held_blocks={alias[replica]: num for replica, num in held.items()},
            )
            winner = self._spec.decide(route, snapshot).replica_id
            found[next(replica for replica, name in alias.items() if name == winner)] += 1
        return {replica: num / NUM_ASKED for replica, num in found.items()}

    def went(self, route: RouteRequest, outcome: Outcome) -> None:
        """It was sent there."""
        self._loads[outcome.replica] += 1
        heappush(self._ends, (outcome.ended_s, outcome.replica))
        self._mirror.insert(outcome.replica, route.block_hashes)


def _state(replica_id: str, num_requests: int) -> ReplicaState:
    return ReplicaState(replica_id, MODEL, MAX_MODEL_LEN, MAX_MODEL_LEN, num_running=num_requests)
