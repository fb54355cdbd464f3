"""The fair queue of one model: virtual token counters.

A tenant's counter is what it was served in a priority band, in weighted tokens over its weight. The waiting tenant with
the lowest counter is next. One that comes back from idleness is lifted to the lowest counter of those waiting: it can
neither save up its absence nor be punished for it. Two tenants that both always wait are then never further apart than
2 · max(INPUT_WEIGHT · longest prompt, OUTPUT_WEIGHT · output tokens in flight).
(Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024.)

Whoever takes requests out may look ahead (`turns`) and pass over some. Within a tenant that is its own affair; between
tenants it is allowed as long as the counters stay as close together as they would without.

Pure bookkeeping: no clock, no event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import inf
from typing import Generic, Protocol, TypeVar

from gateway.tenant_lines import FIRST_MEAN_OUTPUT, NOWHERE_ELSE, Account, Band, Elsewhere
from gateway.types import Job

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
"""An output token costs an engine about twice a prompt token (the paper's weights)."""

MEAN_DECAY = 0.9

MIN_PRUNED = 256

MAX_IDLE_BANDS = 16
"""Priorities that are remembered while nobody uses them."""


class HasJob(Protocol):
    """What can wait: a job, and the prompt tokens that no cache is expected to have."""

    @property
    def job(self) -> Job: ...

    @property
    def num_uncached(self) -> int: ...


W = TypeVar("W", bound=HasJob)


@dataclass(slots=True, eq=False)
class Charge:
    """What a job was charged when it left the queue; `settle` replaces the estimate by what happened.

    `tag` is the tenant's counter before: the job's virtual start time.
    """

    account: Account
    weight: float
    tag: float
    cost: float
    settled: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Turn(Generic[W]):
    """One of those who are next. `first`: it is its band's head.

    `may_pass`: whether it may go before those of its band whose turn comes first. `yields`: somebody who waits in the
    same band at another ingress has had less.
    """

    waiting: W
    may_pass: bool
    yields: bool
    priority: int
    first: bool


def _ignore(priority: int, tenant_id: str, amount: float) -> None:
    """The default observer."""


class FairQueue(Generic[W]):
    """Priority bands (lower first), in a band the tenant with the lowest counter, in a tenant who is due first.

    Each band has a virtual time of its own. `on_service(priority, tenant_id, amount)` hears of what is added to
    counters here. `elsewhere`: what was heard last of other ingresses, by priority.
    """

    def __init__(self, on_service: Callable[[int, str, float], None] = _ignore) -> None:
        self.elsewhere: Mapping[int, Elsewhere] = {}
        self.on_service = on_service
        self._bands: dict[int, Band[W]] = {}
        self._num_waiting = 0
        self._backlog = 0.0
        self._prune_at = MIN_PRUNED

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[W]:
        """Everyone waiting, in no useful order."""
        for band in self._bands.values():
            yield from band.lines

    @property
    def num_accounts(self) -> int:
        return sum(len(band.accounts) for band in self._bands.values())

    @property
    def lowest(self) -> dict[int, float]:
        """By priority, the lowest counter of those who wait; bands in which nobody does are left out."""
        found = {priority: band.lowest for priority, band in self._bands.items()}
        return {priority: lowest for priority, lowest in found.items() if lowest is not None}

    @property
    def latest(self) -> dict[int, float]:
        """By priority, the virtual time the band has come to."""
        return {priority: band.latest for priority, band in self._bands.items()}

    def push(self, waiting: W, due: float = 0.0) -> None:
        """Someone begins to wait. Within its tenant those go first that are `due` first, then those that came first."""
        tenant_id, priority = waiting.job.tenant.tenant_id, waiting.job.priority
        band = self._bands.pop(priority) if priority in self._bands else self._new_band(priority)
        self._bands[priority] = band  # the last that was used is the last of all
        account = self._account(band, tenant_id)
        band.lift(account, band.floor(self._there(band)))
        cost = self.cost(waiting)
        band.lines.add(tenant_id, waiting, (due, cost))
        self._num_waiting += 1
        self._backlog += cost

    def pop(self) -> tuple[W, Charge]:
        """Takes who is next and charges its tenant the estimate. The queue must not be empty."""
        waiting = self.turns(1)[0].waiting
        return waiting, self.take(waiting)

    def turns(self, limit: int) -> list[Turn[W]]:
        """The first `limit` in the order in which they would leave: bands by urgency. O(limit · log tenants).

        Taking one that `may_pass` leaves its tenant no further ahead of the one whose turn it is in that band than the
        dearest of them would leave its own.
        """
        found: list[Turn[W]] = []
        for priority in sorted(self._bands):
            band = self._bands[priority]
            if band.lines and len(found) < limit:
                found += self._turns_of(band, limit - len(found))
        return found

    def _turns_of(self, band: Band[W], limit: int) -> Iterator[Turn[W]]:
        """The first `limit` of one band, in which somebody waits."""
        heads = band.lines.lowest(limit)
        upcoming = [(counter, tenant_id, 0) for counter, tenant_id in heads]
        heapify(upcoming)
        found: list[tuple[W, float]] = []
        dearest = 0.0
        while upcoming and len(found) < limit:
            counter, tenant_id, position = heappop(upcoming)
            waiting = band.lines.at(tenant_id, position)
            cost = self.cost(waiting) / waiting.job.tenant.weight
            dearest = max(dearest, cost)
            found.append((waiting, band.counter(tenant_id) + cost))
            if position + 1 < band.lines.num_of(tenant_id):
                heappush(upcoming, (counter + cost, tenant_id, position + 1))
        lowest, first = heads[0]
        lowest_elsewhere = self._there(band).lowest
        bound = lowest + dearest
        bound_elsewhere = inf if lowest_elsewhere is None else band.bounded(lowest_elsewhere) + dearest
        for number, (waiting, after) in enumerate(found):
            may_pass = after <= bound or waiting.job.tenant.tenant_id == first
            yield Turn(waiting, may_pass, after > bound_elsewhere, band.priority, number == 0)

    def take(self, waiting: W) -> Charge:
        """Lets someone go and charges its tenant the estimate."""
        job = waiting.job
        self.remove(waiting)
        band = self._bands[job.priority]
        account = band.accounts[job.tenant.tenant_id]
        charge = Charge(account, job.tenant.weight, account.counter, self.cost(waiting))
        band.leaves(account)
        self._serve(account, charge.cost / charge.weight)
        return charge

    def remove(self, waiting: W) -> None:
        """Takes someone out, wherever it stands; it is charged nothing."""
        cost = self._bands[waiting.job.priority].lines.remove(waiting.job.tenant.tenant_id, waiting)
        self._num_waiting -= 1
        self._backlog = self._backlog - cost if self._num_waiting else 0.0

    def newest(self, tenant_id: str) -> W | None:
        """The tenant's last arrival in its least urgent band."""
        for priority in sorted(self._bands, reverse=True):
            newest = self._bands[priority].lines.newest(tenant_id)
            if newest is not None:
                return newest
        return None

    def cost(self, waiting: W) -> float:
        """The estimate: uncached prompt tokens, and output tokens at the tenant's running mean."""
        band = self._bands.get(waiting.job.priority)
        account = None if band is None else band.accounts.get(waiting.job.tenant.tenant_id)
        mean_output = FIRST_MEAN_OUTPUT if account is None else account.mean_output
        num_output = min(mean_output, waiting.job.sampling.max_tokens)
        return INPUT_WEIGHT * waiting.num_uncached + OUTPUT_WEIGHT * num_output

    def backlog(self) -> float:
        """The cost of all that wait, as estimated when they came."""
        return self._backlog

    def settle(self, charge: Charge, num_uncached: int, num_output: int) -> None:
        """Corrects a charge to what was really served, and learns from it."""
        cost = INPUT_WEIGHT * num_uncached + OUTPUT_WEIGHT * num_output
        account = charge.account
        if not charge.settled:
            charge.settled = True
            account.num_charged -= 1
        self._serve(account, (cost - charge.cost) / charge.weight)
        charge.cost = cost
        if num_output:
            account.mean_output = MEAN_DECAY * account.mean_output + (1 - MEAN_DECAY) * num_output

    def counter(self, tenant_id: str, priority: int = 0) -> float:
        """The tenant's virtual time; 0 for one never seen."""
        band = self._bands.get(priority)
        return 0.0 if band is None else band.counter(tenant_id)

    # The other ingresses.

    def hear(self, elsewhere: Mapping[int, Elsewhere]) -> None:
        """What the others tell by now, by priority; empty while none can be heard."""
        self.elsewhere = elsewhere
        for priority, band in self._bands.items():
            if (there := elsewhere.get(priority)) is not None:
                band.catch_up(there.latest)

    def served_elsewhere(self, tenant_id: str, amount: float, priority: int = 0) -> None:
        """Another ingress has let the tenant be served (or corrects that), in virtual time.

        It can put the tenant at most MAX_DEBT behind those who wait here, and never before the first of them.
        """
        band = self._bands.get(priority)
        if band is None:
            band = self._bands[priority] = self._new_band(priority)
        account = self._account(band, tenant_id)
        if amount > 0:  # it waited there, and was lifted
            band.lift(account, band.floor(self._there(band)))
        band.add_elsewhere(account, amount)

    def shift(self, amount: float, priority: int = 0) -> None:
        """Moves a band's virtual time by so much: the order stays what it is."""
        if (band := self._bands.get(priority)) is not None:
            band.shift(amount)

    def check(self) -> None:
        """Asserts that the counts agree with the lines; for tests."""
        waiting = list(self)
        assert len(waiting) == self._num_waiting, f"{len(waiting)=} {self._num_waiting=}"
        costs = sum(band.check() for band in self._bands.values())
        assert abs(costs - self._backlog) < 1e-3, f"{costs=} {self._backlog=}"

    def _there(self, band: Band[W]) -> Elsewhere:
        return self.elsewhere.get(band.priority, NOWHERE_ELSE)

    def _new_band(self, priority: int) -> Band[W]:
        """One that begins where the others are; those unused for longest are forgotten for it."""
        idle = [band.priority for band in self._bands.values() if band.idle]
        for forgotten in idle[: max(0, len(idle) - MAX_IDLE_BANDS + 1)]:
            del self._bands[forgotten]
        there = self.elsewhere.get(priority, NOWHERE_ELSE)
        return Band(priority, there.latest, joined=priority in self.elsewhere)

    def _account(self, band: Band[W], tenant_id: str) -> Account:
        account = band.accounts.get(tenant_id)
        if account is None:
            if self.num_accounts >= self._prune_at:
                for each in self._bands.values():
                    each.prune(each.floor(self._there(each)))
                self._prune_at = max(MIN_PRUNED, 2 * self.num_accounts)
            account = band.accounts[tenant_id] = Account(tenant_id, band.priority)
        return account

    def _serve(self, account: Account, amount: float) -> None:
        band = self._bands.get(account.priority)
        if band is None:
            account.counter += amount
        else:
            band.add(account, amount)
        self.on_service(account.priority, account.tenant_id, amount)
