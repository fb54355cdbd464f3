"""The fair queue of one model: virtual token counters.

A tenant's counter is what it was served, in weighted tokens over its weight. The waiting tenant with the lowest counter
is next. One that comes back from idleness is lifted to the lowest counter of those waiting, so it can neither save up
its absence nor be punished for it. Two tenants that both always wait are then never further apart than
2 · max(INPUT_WEIGHT · longest prompt, OUTPUT_WEIGHT · output tokens in flight).
(Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024.)

Pure bookkeeping: no clock, no event loop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from gateway.types import Job

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
"""An output token costs an engine about twice a prompt token (the paper's weights)."""

FIRST_MEAN_OUTPUT = 128.0
MEAN_DECAY = 0.9


class HasJob(Protocol):
    """What can wait: a job, and the prompt tokens that no cache is expected to have."""

    @property
    def job(self) -> Job: ...

    @property
    def num_uncached(self) -> int: ...


W = TypeVar("W", bound=HasJob)


@dataclass(slots=True, eq=False)
class Account:
    """One tenant's standing at one model. `mean_output`: output tokens of its requests, a running mean."""

    counter: float = 0.0
    mean_output: float = FIRST_MEAN_OUTPUT
    num_waiting: int = 0


@dataclass(slots=True, eq=False)
class Charge:
    """What a job was charged when it left the queue; `settle` replaces the estimate by what happened.

    `tag` is the tenant's counter before: the job's virtual start time.
    """

    account: Account
    weight: float
    tag: float
    cost: float


@dataclass(slots=True, eq=False)
class FairQueue(Generic[W]):
    """Priority bands (lower first), in a band the tenant with the lowest counter, in a tenant first come, first out."""

    _accounts: dict[str, Account] = field(default_factory=dict)
    _bands: dict[int, dict[str, OrderedDict[W, float]]] = field(default_factory=dict)
    _num_waiting: int = 0
    _backlog: float = 0.0
    _last_left: Account | None = None

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[W]:
        """Everyone waiting, in no useful order."""
        for band in self._bands.values():
            for line in band.values():
                yield from line

    def push(self, waiting: W) -> None:
        """Puts someone at the end of its tenant's line."""
        tenant_id = waiting.job.tenant.tenant_id
        account = self._accounts.setdefault(tenant_id, Account())
        if account.num_waiting == 0:
            account.counter = max(account.counter, self._lowest_waiting())
        account.num_waiting += 1
        self._num_waiting += 1
        cost = self.cost(waiting)
        self._backlog += cost
        self._bands.setdefault(waiting.job.priority, {}).setdefault(tenant_id, OrderedDict())[waiting] = cost

    def pop(self) -> tuple[W, Charge]:
        """Takes who is next and charges its tenant the estimate. The queue must not be empty."""
        band = self._bands[min(self._bands)]
        tenant_id = min(band, key=lambda t: (self._accounts[t].counter, t))
        waiting = next(iter(band[tenant_id]))
        self.remove(waiting)
        account = self._accounts[tenant_id]
        charge = Charge(account, waiting.job.tenant.weight, account.counter, self.cost(waiting))
        account.counter += charge.cost / charge.weight
        self._last_left = account
        return waiting, charge

    def remove(self, waiting: W) -> None:
        """Takes someone out, wherever it stands; it is charged nothing."""
        job = waiting.job
        tenant_id = job.tenant.tenant_id
        band = self._bands[job.priority]
        cost = band[tenant_id].pop(waiting)
        if not band[tenant_id]:
            del band[tenant_id]
        if not band:
            del self._bands[job.priority]
        self._accounts[tenant_id].num_waiting -= 1
        self._num_waiting -= 1
        self._backlog = self._backlog - cost if self._num_waiting else 0.0

    def newest(self, tenant_id: str) -> W | None:
        """The tenant's last arrival in its least urgent band."""
        for priority in sorted(self._bands, reverse=True):
            if tenant_id in self._bands[priority]:
                return next(reversed(self._bands[priority][tenant_id]))
        return None

    def cost(self, waiting: W) -> float:
        """The estimate: uncached prompt tokens, and output tokens at the tenant's running mean."""
        account = self._accounts.get(waiting.job.tenant.tenant_id)
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
        account.counter += (cost - charge.cost) / charge.weight
        charge.cost = cost
        if num_output:
            account.mean_output = MEAN_DECAY * account.mean_output + (1 - MEAN_DECAY) * num_output

    def counter(self, tenant_id: str) -> float:
        """The tenant's virtual time; 0 for one never seen."""
        account = self._accounts.get(tenant_id)
        return 0.0 if account is None else account.counter

    def _lowest_waiting(self) -> float:
        counters = [account.counter for account in self._accounts.values() if account.num_waiting]
        if counters:
            return min(counters)
        return 0.0 if self._last_left is None else self._last_left.counter

    def check(self) -> None:
        """Asserts that the counts agree with the lines; for tests."""
        waiting = list(self)
        assert len(waiting) == self._num_waiting, f"{len(waiting)=} {self._num_waiting=}"
        costs = [cost for band in self._bands.values() for line in band.values() for cost in line.values()]
        assert abs(sum(costs) - self._backlog) < 1e-3, f"{sum(costs)=} {self._backlog=}"
        for tenant_id, account in self._accounts.items():
            num = sum(1 for w in waiting if w.job.tenant.tenant_id == tenant_id)
            assert num == account.num_waiting, f"{tenant_id}: {num=} {account.num_waiting=}"
        assert all(line for band in self._bands.values() for line in band.values()), "an empty line was left behind"
