"""Late binding: who leaves an ingress's queue next, and for which replica.

    turns, in fair order ─► where is it best off? ─► a place there ─► it goes
                                                 └─► none yet ─► it waits for that one while waiting pays,
                                                                 and those behind it may pass

A request is not tied to a replica before that has a place for it, so what arrives and ends meanwhile still counts; and
it is not sent to a cold replica because the warm one is busy for a moment. Nobody is held for long: from when it first
could have gone elsewhere, it waits `PATIENCE` times the seconds that waiting would save, and then takes the next place
there is. Between tenants, passing is bounded by `FairQueue.turns`; a place that nobody may take for that reason goes to
the first of its priority band at once.

Pure: the gateway and the simulator choose by the very same functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Generic, Protocol, TypeVar

import msgspec

from gateway.fair_queue import FairQueue, HasJob, Turn
from routing.cost import PRIOR_PREFILL_TOKENS_PER_S
from routing.policy import NO_ADAPTERS, OTHER_MODEL, TOO_LONG
from routing.types import Candidate, Decision, ReplicaState, RouteRequest
from routing.waiting import SHORTEST, STRETCH

PATIENCE = 3.0
"""How long to wait for a busy replica, in units of what that saves over the best one that has a place. Found by
measurement (docs/decisions/0008-late-binding.md): below 1 something is lost, above 3 nothing is gained."""

MAX_HELD_S = 10.0

TURN_S = 0.01
"""How much later than the ingress before it an ingress uses a place that has come free: two ways of the channel, in
which it hears that the place is taken. Who has just come need not wait for its ingress's turn, unless somebody who came
before does."""

YIELD_S = 0.05
"""How much longer a place is left to a tenant who waits at another ingress and has had less; when nobody there takes
it, it is used in spite of that."""

FRESH_S = 0.05
"""How long the comparison of all replicas for one request is relied on. Whether its best one has a place by now is
looked at each time."""


@dataclass(frozen=True, slots=True)
class _Claim:
    """When somebody may use the place that it saw at a replica, in which period (`LookAhead`)."""

    replica_id: str
    period: int
    use_at: float


@dataclass(slots=True)
class Outlook:
    """What was found for one who waits: `decision` among all replicas, as if none were full; made `at`; `best` won.

    `held_since`: since when it has waited for the best one although another had a place; it goes elsewhere at `go_at`.
    """

    decision: Decision
    best: Candidate | None
    at: float
    held_since: float = inf
    go_at: float = inf
    claim: _Claim | None = None

    def next_look(self, now: float) -> float:
        """When something changes without any news."""
        times = (self.go_at, inf if self.claim is None else self.claim.use_at)
        return min((at for at in times if at > now), default=inf)


class Waits(HasJob, Protocol):
    """Who can be bound: besides the job, what routing knows of it, since when it waits, when it is due
    (`routing.ageing`), and when its wait ends in an error."""

    outlook: Outlook | None

    @property
    def since(self) -> float: ...

    @property
    def route(self) -> RouteRequest: ...

    @property
    def due(self) -> float: ...

    @property
    def expires(self) -> float: ...


W = TypeVar("W", bound=Waits)


@dataclass(frozen=True, slots=True)
class Pair(Generic[W]):
    """Who goes, and where; `decision` is None where whoever sends it decides."""

    waiting: W
    decision: Decision | None


@dataclass(frozen=True, slots=True)
class Nobody:
    """Nobody can go now. It may be worth looking again at `until` without any news."""

    until: float = inf


class Site(Protocol):
    """The replicas of one model, as the ingress sees them."""

    @property
    def now(self) -> float: ...

    def states(self) -> tuple[ReplicaState, ...]: ...

    def weigh(self, route: RouteRequest, replicas: tuple[ReplicaState, ...]) -> Decision:
        """Which of these the policy prefers, in seconds."""
        ...


def has_place(replica: ReplicaState, num_uncached: int, overdue_s: float) -> bool:
    """Whether a replica wants a request with so many prompt tokens to compute, due since so long, now.

    One that tells how many tokens it wants pending takes what fewer than that go before: by size, what is shorter than
    its pending prompts. A long one that is overdue counts as shorter and shorter, so that it does not starve.
    """
    if not replica.wanted_tokens:
        return not replica.full
    if replica.num_places <= 0:
        return False
    pending = replica.pending
    if replica.prefill_order == SHORTEST:
        rate = replica.prefill_tokens_per_s or PRIOR_PREFILL_TOKENS_PER_S
        own = min(num_uncached, pending.alike) - overdue_s * rate / STRETCH
        return not pending.means or pending.ahead_and_behind(int(own))[0] < replica.wanted_tokens
    return replica.num_waiting_tokens + replica.num_sent_tokens < replica.wanted_tokens


def can_ever_go(decision: Decision) -> bool:
    """Whether any replica could take the request, now or after a while: not where each is too small for it."""
    return not decision.candidates or any(c.filtered not in _FOR_GOOD for c in decision.candidates)


class LookAhead:
    """Chooses requests and replicas together, among the first `limit` in fair order; for one queue.

    A period ends when no replica has a place: what was seen before is gone.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._period = 0

    def __call__(self, queue: FairQueue[W], site: Site) -> Pair[W] | Nobody:
        """Who goes now. It takes nobody out of the queue; to be asked again until it names nobody."""
        if not queue:
            return Nobody()
        look = _Look(site, self._period)
        if not look.has_places:
            self._period += 1
            return Nobody()
        until = look.now + FRESH_S
        first: dict[int, W] = {}
        kept_from: W | None = None
        for turn in queue.turns(self.limit):
            head = first.setdefault(turn.priority, turn.waiting)
            pair = look.pair(turn)
            if pair is not None and turn.may_pass:
                return pair
            if pair is not None and kept_from is None:
                kept_from = head
            assert turn.waiting.outlook is not None, "it was looked at just now"
            until = min(until, turn.waiting.outlook.next_look(look.now))
        if kept_from is not None and (pair := look.anywhere(kept_from)) is not None:
            return pair
        return Nobody(until)


_FOR_GOOD = frozenset((TOO_LONG, NO_ADAPTERS, OTHER_MODEL))


class _Look:
    """One look at the queue: what the replicas are like now."""

    def __init__(self, site: Site, period: int) -> None:
        self.now = site.now
        self._site = site
        self._period = period
        self._states = site.states()
        self._by_id = {state.replica_id: state for state in self._states}
        self._as_if_free: tuple[ReplicaState, ...] | None = None
        self._claimed: set[str] = set()

    @property
    def has_places(self) -> bool:
        """Whether any replica can take one more at all."""
        return any(_works(s) and (s.num_places > 0 if s.wanted_tokens else not s.full) for s in self._states)

    def pair(self, turn: Turn[W]) -> Pair[W] | None:
        """Where it goes now, if it does."""
        waiting = turn.waiting
        outlook = waiting.outlook
        if outlook is None or self.now >= min(outlook.go_at, outlook.at + FRESH_S):
            outlook = waiting.outlook = self._compared(waiting, outlook)
        best = outlook.best
        if best is None:
            return None if can_ever_go(outlook.decision) else Pair(waiting, outlook.decision)
        if self._open(waiting, best):
            return Pair(waiting, outlook.decision) if self._may_use(turn, outlook, best.replica_id) else None
        outlook.claim = None
        if outlook.at < self.now:
            return None
        return self._elsewhere(waiting, outlook, best)

    def anywhere(self, waiting: W) -> Pair[W] | None:
        """The best place for it that there is now."""
        assert waiting.outlook is not None
        other = self._cheapest(waiting, waiting.outlook.decision)
        return None if other is None else self._sent_to(waiting, other)

    def _compared(self, waiting: W, before: Outlook | None) -> Outlook:
        """All replicas weighed anew."""
        decision = self._site.weigh(waiting.route, self._unfilled())
        if before is None:
            return Outlook(decision, decision.winner, self.now)
        return Outlook(decision, decision.winner, self.now, before.held_since, claim=before.claim)

    def _may_use(self, turn: Turn[W], outlook: Outlook, replica_id: str) -> bool:
        """Whether the place at its best replica is this ingress's to use now, and this request's."""
        claim = outlook.claim
        if claim is None or claim.replica_id != replica_id or claim.period != self._period:
            has_just_come = self.now < turn.waiting.since + TURN_S and replica_id not in self._claimed
            delay_s = 0.0 if has_just_come else TURN_S * self._by_id[replica_id].turn
            delay_s += YIELD_S if turn.yields else 0.0
            claim = outlook.claim = _Claim(replica_id, self._period, self.now + delay_s)
        if self.now >= claim.use_at:
            return True
        self._claimed.add(replica_id)
        return False

    def _elsewhere(self, waiting: W, outlook: Outlook, best: Candidate) -> Pair[W] | None:
        """There is no place at its best replica: it goes to another one if it has waited long enough for that.

        So that it is still in time there, too, when its wait would soon end in an error.
        """
        other = self._cheapest(waiting, outlook.decision)
        if other is None:
            return None
        outlook.held_since = min(outlook.held_since, self.now)
        patient_until = outlook.held_since + min(PATIENCE * (other.cost_s - best.cost_s), MAX_HELD_S)
        outlook.go_at = min(patient_until, waiting.expires - other.cost_s)
        return self._sent_to(waiting, other) if outlook.go_at <= self.now else None

    def _sent_to(self, waiting: W, candidate: Candidate) -> Pair[W]:
        assert waiting.outlook is not None
        decision = waiting.outlook.decision
        reason = f"{decision.replica_id} would cost less, and was busy for too long"
        return Pair(waiting, msgspec.structs.replace(decision, replica_id=candidate.replica_id, reason=reason))

    def _cheapest(self, waiting: W, decision: Decision) -> Candidate | None:
        return min(self._open_ones(waiting, decision), key=lambda c: (c.cost_s, c.replica_id), default=None)

    def _open_ones(self, waiting: W, decision: Decision) -> Iterator[Candidate]:
        for candidate in decision.candidates:
            if candidate.filtered is None and self._open(waiting, candidate):
                yield candidate

    def _open(self, waiting: W, candidate: Candidate) -> bool:
        replica = self._by_id.get(candidate.replica_id)
        if replica is None or not _works(replica):
            return False
        num_uncached = waiting.route.num_prompt_tokens - candidate.matched_tokens
        return has_place(replica, num_uncached, max(0.0, self.now - waiting.due))

    def _unfilled(self) -> tuple[ReplicaState, ...]:
        """The replicas as if none had as many requests as it should."""
        if self._as_if_free is None:
            replace = msgspec.structs.replace
            self._as_if_free = tuple([replace(s, full=False) if s.full else s for s in self._states])
        return self._as_if_free


def _works(replica: ReplicaState) -> bool:
    """Whether it is to be sent anything."""
    return not (replica.draining or replica.breaker_open)
