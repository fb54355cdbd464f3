"""How an ingress lets jobs go under a policy that weighs in seconds: request and replica are chosen together."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from configs.schema import Config
from gateway.admission import FairOrder, Matching
from gateway.binding import LookAhead, Nobody, Pair
from gateway.fair_queue import FairQueue
from gateway.line import Waiting
from gateway.router import Router
from gateway.ticket import Reservation
from routing.ageing import Dues
from routing.cost import PRIOR_PREFILL_TOKENS_PER_S
from routing.types import Decision, ReplicaState, RouteRequest


@dataclass(frozen=True, slots=True)
class _Site:
    """The replicas of one model (`gateway.binding.Site`)."""

    router: Router
    model_id: str

    @property
    def now(self) -> float:
        return self.router.now

    def states(self) -> tuple[ReplicaState, ...]:
        return self.router.states(self.model_id)

    def weigh(self, route: RouteRequest, replicas: tuple[ReplicaState, ...]) -> Decision:
        return self.router.weigh(route, replicas)


class JointChoice:
    """Implements `gateway.admission.Matching`, among the first `look_ahead` in fair order."""

    def __init__(self, router: Router, look_ahead: int) -> None:
        self._router = router
        self._look_ahead = look_ahead
        self._choosers: dict[str, LookAhead] = {}
        self._dues: dict[str, Dues] = {}

    def due(self, waiting: Waiting) -> float:
        """Of a tenant's jobs those go first that replicas would compute first: short ones, within bounds.

        A deadline that can still be met takes the handicap of a long one away.
        """
        job, model_id = waiting.job, waiting.route.model
        rate = self._router.prefill_tokens_per_s(model_id) or PRIOR_PREFILL_TOKENS_PER_S
        dues = self._dues.get(model_id)
        if dues is None:
            dues = self._dues[model_id] = Dues()
        due = dues.due(waiting.since, waiting.num_uncached, rate)
        begin_at = inf if job.deadline is None else job.deadline - waiting.num_uncached / rate
        return min(due, begin_at) if begin_at >= waiting.since else due

    def stays(self, waiting: Waiting) -> None:
        self._router.prefetch(waiting.route)

    def next(self, queue: FairQueue[Waiting], model_id: str, num_free: int) -> Pair[Waiting] | Nobody:
        choose = self._choosers.get(model_id)
        if choose is None:
            choose = self._choosers[model_id] = LookAhead(self._look_ahead)
        return choose(queue, _Site(self._router, model_id))

    def reserve(self, pair: Pair[Waiting]) -> Reservation | None:
        return None if pair.decision is None else self._router.reserve(pair.waiting.route, pair.decision)


def matching(config: Config, router: Router) -> Matching:
    """What the profile asks for; a policy that does not weigh in seconds has nothing to choose by."""
    if config.admission.look_ahead and router.weighs_seconds:
        return JointChoice(router, config.admission.look_ahead)
    return FairOrder(router.prefetch)
