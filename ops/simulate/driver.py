"""Plays a trace through ingresses and replicas on a virtual clock.

    heap of events: (seconds, kind, number)      kind 0: a replica's next event   1: an arrival   2: look at the queue

    run(trace, "warm", FleetSpec(num_replicas=8), load=0.8) → Result
    run_while_sustained(…)                                  → Result, or None as soon as too many are late

Nothing but the order of events depends on the heap: with the same trace, policy, fleet and seed the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from math import inf

from ops.simulate.errors import SimulationError
from ops.simulate.fleet import FleetSpec
from ops.simulate.ingress import Ingress, Placed
from ops.simulate.replica import SimReplica
from ops.simulate.result import Outcome, Played, Result
from ops.simulate.slo import Hopes
from ops.simulate.trace import Trace
from ops.simulate.work import Progress, Work
from routing.policies import POLICIES, PolicySpec

_REPLICA, _ARRIVAL, _PUMP = 0, 1, 2


def run(trace: Trace, policy: str | PolicySpec, fleet: FleetSpec, load: float) -> Result:
    """What becomes of every request of `trace`, played at `load` (see `ops.simulate.trace`).

    `policy` is a name of `routing.policies.POLICIES`, or a spec to be tried. Raises SimulationError for an unknown one.
    """
    return _Run(trace, policy_named(policy), fleet, load).play()


def run_while_sustained(trace: Trace, policy: str | PolicySpec, fleet: FleetSpec, load: float) -> Result | None:
    """The same where the load is sustained (`ops.simulate.slo`); None, and much sooner, where it is not."""
    return _Run(trace, policy_named(policy), fleet, load).play_while_sustained()


def policy_named(policy: str | PolicySpec) -> PolicySpec:
    """The policy of that name; raises SimulationError."""
    if isinstance(policy, PolicySpec):
        return policy
    if policy not in POLICIES:
        raise SimulationError(f"no policy {policy!r}: there are {', '.join(POLICIES)}")
    return POLICIES[policy]


class _Run:
    """One simulation under way."""

    def __init__(self, trace: Trace, policy: PolicySpec, fleet: FleetSpec, load: float) -> None:
        self.trace = fleet.fitting(trace)
        self.policy = policy
        self.fleet = fleet
        self.load = load
        self.now = 0.0
        self._events: list[tuple[float, int, int]] = []
        self._due = [inf] * fleet.num_replicas
        self._pump_at = [inf] * fleet.num_ingresses
        self._placed: dict[int, tuple[Ingress, Placed]] = {}
        self._followers: dict[int, list[int]] = {}
        self.outcomes = [Outcome() for _ in self.trace.requests]
        self.replicas = [
            SimReplica(fleet.replica, self.trace.block_tokens, self._log_of(number))
            for number in range(fleet.num_replicas)
        ]
        self.ingresses = [Ingress(policy, fleet, self.replicas, self._clock) for _ in range(fleet.num_ingresses)]

    def play(self) -> Result:
        self._begin()
        while self._events:
            self._step()
        return self._result()

    def play_while_sustained(self) -> Result | None:
        slo, calibration = self.fleet.slo, self.fleet.replica.calibration
        targets_s = [slo.target_s(request, calibration) for request in self.trace.requests]
        hopes = Hopes(slo, targets_s, self.outcomes)
        self._begin()
        while self._events:
            kind, number = self._step()
            if kind == _ARRIVAL:
                hopes.arrived(number, self.now)
                hopes.look(self.now)
                if not hopes.any:
                    return None
        result = self._result()
        return result if result.sustained else None

    def _begin(self) -> None:
        """Every arrival that hangs on no other."""
        arrivals = self.trace.arrivals(self.load, self.fleet.tokens_per_s)
        for index, request in enumerate(self.trace.requests):
            if request.after is None:
                self._events.append((arrivals[index], _ARRIVAL, index))
            else:
                self._followers.setdefault(request.after, []).append(index)
        self._events.sort()

    def _step(self) -> tuple[int, int]:
        """The next event: its kind and number."""
        at, kind, number = heappop(self._events)
        self.now = max(self.now, at)
        if kind == _REPLICA:
            if self._due[number] == at:
                self._take(number, self.replicas[number].advance())
        elif kind == _ARRIVAL:
            self._arrive(number)
        elif self._pump_at[number] == at:
            self._pump_at[number] = inf
            self.ingresses[number].view.look()
            self._pump(number)
        return kind, number

    def _result(self) -> Result:
        return Result.of(Played(self.policy.name, self.trace, self.fleet, self.load, self.outcomes, self.replicas))

    def _clock(self) -> float:
        return self.now

    def _log_of(self, replica: int) -> Callable[[str, tuple[int, ...]], None]:
        def log(kind: str, hashes: tuple[int, ...]) -> None:
            for ingress in self.ingresses:
                if ingress.view.feeds:
                    ingress.view.feeds[replica].tell(self.now, kind, hashes)

        return log

    def _arrive(self, index: int) -> None:
        number = index % len(self.ingresses)
        self.outcomes[index].arrival_s = self.now
        for replica in self.replicas:
            replica.catch_up(self.now)
        self.ingresses[number].arrive(index, self.trace.requests[index])
        if self.fleet.replica.max_adapters:  # it may have asked a replica to load something
            for asked in range(len(self.replicas)):
                self._schedule(asked)
        self._pump(number)

    def _pump(self, number: int) -> None:
        """Lets go whom there is a place for."""
        ingress = self.ingresses[number]
        while (placed := ingress.bind()) is not None:
            index = placed.index
            self._placed[index] = (ingress, placed)
            self.outcomes[index].replica = placed.replica
            self.outcomes[index].sent_s = self.now
            work = Work(self.trace.requests[index], index, placed.bound.charge.tag)
            self._take(placed.replica, self.replicas[placed.replica].submit(work, self.now))
        if ingress.queue and ingress.look_at < self._pump_at[number]:
            self._pump_later(number, ingress.look_at)

    def _take(self, number: int, progress: Progress) -> None:
        """What an event at a replica brought."""
        self._schedule(number)
        for work in progress.admitted:
            self.outcomes[work.tag].num_cached = work.num_cached
        for work in progress.first:
            self.outcomes[work.tag].first_s = progress.at + self.fleet.replica.calibration.overhead_s
            ingress, placed = self._placed[work.tag]
            ingress.answered(placed)
        for work in progress.ended:
            self._ended(work, progress.at)
        if self.fleet.binds_late:
            self._look_later()

    def _schedule(self, number: int) -> None:
        due = self.replicas[number].next_at
        if due != self._due[number]:
            self._due[number] = due
            if due != inf:
                heappush(self._events, (due, _REPLICA, number))

    def _ended(self, work: Work, now: float) -> None:
        index = work.tag
        end_s = self.outcomes[index].end_s = now + self.fleet.replica.calibration.overhead_s
        ingress, placed = self._placed.pop(index)
        request = work.request
        ingress.ended(placed, request.num_prompt - work.num_cached, request.num_output)
        for follower in self._followers.pop(index, ()):
            heappush(self._events, (end_s + self.trace.requests[follower].think_s, _ARRIVAL, follower))

    def _look_later(self) -> None:
        """Ingresses with somebody waiting look again when the replica's news has arrived."""
        at = self.now + self.fleet.stats_delay_s
        for number, ingress in enumerate(self.ingresses):
            if ingress.queue and at < self._pump_at[number]:
                self._pump_later(number, at)

    def _pump_later(self, number: int, at: float) -> None:
        self._pump_at[number] = at
        heappush(self._events, (at, _PUMP, number))
