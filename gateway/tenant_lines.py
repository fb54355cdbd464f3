"""One priority band of the fair queue: tenants' virtual time, a line for each, and who is next. Logarithmic in both.

heap of (counter, tenant)     an entry counts while the tenant waits and its counter is still that
line of a tenant              sorted by (due, number of arrival)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

W = TypeVar("W")

FIRST_MEAN_OUTPUT = 128.0

MAX_DEBT = 1_000_000.0
"""How far service elsewhere can put a tenant behind the others here, in its virtual time; and how far behind the other
ingresses one can be without having counted alone."""

_SLACK = 64


@dataclass(slots=True, eq=False)
class Account:
    """One tenant's standing in one band of one model. `mean_output`: output tokens of its requests, a running mean.

    `num_charged`: its jobs that have left the queue and are not settled.
    """

    tenant_id: str
    priority: int
    counter: float = 0.0
    mean_output: float = FIRST_MEAN_OUTPUT
    num_charged: int = 0


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Virtual time of a band at the other ingresses: the lowest counter of those who wait there, and the latest they
    came to."""

    lowest: float | None = None
    latest: float = 0.0


NOWHERE_ELSE = Elsewhere()


class _Line(Generic[W]):
    """Those of one tenant. `members`: (due, number, cost) of each, by arrival."""

    __slots__ = ("members", "order")

    def __init__(self) -> None:
        self.order: list[tuple[float, int, W]] = []
        self.members: dict[W, tuple[float, int, float]] = {}


class Lines(Generic[W]):
    """Those who wait. `counter(tenant_id)` is asked whenever a tenant's standing counts; `moved` must be called when it
    changes."""

    def __init__(self, counter: Callable[[str], float]) -> None:
        self._counter = counter
        self._lines: dict[str, _Line[W]] = {}
        self._heap: list[tuple[float, str]] = []
        self._num_added = 0

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __contains__(self, tenant_id: str) -> bool:
        """Whether any of the tenant's waits here."""
        return tenant_id in self._lines

    def __iter__(self) -> Iterator[W]:
        for line in self._lines.values():
            yield from line.members

    def add(self, tenant_id: str, waiting: W, standing: tuple[float, float]) -> None:
        """Someone joins its tenant's line; `standing` is (due, cost)."""
        line = self._lines.get(tenant_id)
        if line is None:
            line = self._lines[tenant_id] = _Line()
            self.moved(tenant_id)
        due, cost = standing
        number = self._num_added
        self._num_added += 1
        line.members[waiting] = (due, number, cost)
        insort(line.order, (due, number, waiting))

    def remove(self, tenant_id: str, waiting: W) -> float:
        """Takes someone out; returns its cost."""
        line = self._lines[tenant_id]
        due, number, cost = line.members.pop(waiting)
        del line.order[bisect_left(line.order, (due, number))]
        if not line.order:
            del self._lines[tenant_id]
        return cost

    def at(self, tenant_id: str, position: int) -> W:
        """Who is at this place of the tenant's line."""
        return self._lines[tenant_id].order[position][2]

    def num_of(self, tenant_id: str) -> int:
        """How many of the tenant wait here."""
        return len(self._lines[tenant_id].order)

    def newest(self, tenant_id: str) -> W | None:
        """The tenant's last arrival."""
        line = self._lines.get(tenant_id)
        return None if line is None else next(reversed(line.members))

    def lowest(self, limit: int) -> list[tuple[float, str]]:
        """The first `limit` tenants by (counter, id), ascending."""
        heap, lines, counter = self._heap, self._lines, self._counter
        found: list[tuple[float, str]] = []
        while heap and len(found) < limit:
            entry = heappop(heap)
            if entry[1] in lines and counter(entry[1]) == entry[0] and (not found or found[-1] != entry):
                found.append(entry)
        for entry in found:
            heappush(heap, entry)
        return found

    def moved(self, tenant_id: str) -> None:
        """The tenant's counter is another now. No-op for one that does not wait here."""
        if tenant_id in self._lines:
            heappush(self._heap, (self._counter(tenant_id), tenant_id))
            if len(self._heap) > 2 * len(self._lines) + _SLACK:
                self.reorder()

    def reorder(self) -> None:
        """All counters may be others now."""
        self._heap = [(self._counter(tenant_id), tenant_id) for tenant_id in self._lines]
        heapify(self._heap)

    def tenants(self) -> Iterator[str]:
        """Who has anyone here."""
        return iter(self._lines)

    def check(self) -> float:
        """Asserts that everything agrees; returns the cost of all who wait. For tests."""
        for tenant_id, line in self._lines.items():
            assert line.order, f"an empty line of {tenant_id} was left behind"
            assert line.order == sorted((due, number, w) for w, (due, number, _) in line.members.items())
        everyone = sorted((self._counter(tenant_id), tenant_id) for tenant_id in self._lines)
        assert self.lowest(len(everyone)) == everyone
        return sum(cost for line in self._lines.values() for _, _, cost in line.members.values())


class Band(Generic[W]):
    """Accounts and lines of one priority.

    `latest`: the virtual time it has come to, here or at an ingress heard of: the highest start tag of those who left
    (Goyal et al., "Start-time Fair Queuing", SIGCOMM 1996). It never goes back. `joined`: whether others' is known.
    """

    def __init__(self, priority: int, latest: float, joined: bool) -> None:
        self.priority = priority
        self.latest = latest
        self.accounts: dict[str, Account] = {}
        self.lines: Lines[W] = Lines(self.counter)
        self._joined = joined

    @property
    def lowest(self) -> float | None:
        """The lowest counter of those who wait; None when nobody does."""
        return self.lines.lowest(1)[0][0] if self.lines else None

    @property
    def idle(self) -> bool:
        """Whether nobody waits, and everything is settled."""
        return not self.lines and not any(account.num_charged for account in self.accounts.values())

    def counter(self, tenant_id: str) -> float:
        """The tenant's virtual time; 0 for one never seen."""
        account = self.accounts.get(tenant_id)
        return 0.0 if account is None else account.counter

    def floor(self, there: Elsewhere) -> float:
        """What somebody is lifted to who begins to wait: the lowest who waits anywhere, else where time stands.

        An ingress where people wait in vain is followed no further than MAX_DEBT back.
        """
        lowest = self.lowest
        if there.lowest is None:
            return max(self.latest, there.latest) if lowest is None else lowest
        lowest_elsewhere = self.bounded(there.lowest)
        return lowest_elsewhere if lowest is None else min(lowest, lowest_elsewhere)

    def bounded(self, lowest_elsewhere: float) -> float:
        """The lowest who waits elsewhere, as far as it counts here."""
        return max(lowest_elsewhere, self.latest - MAX_DEBT)

    def lift(self, account: Account, floor: float) -> None:
        """Its tenant begins to wait, here or elsewhere. No-op while it waits here."""
        if account.tenant_id not in self.lines:
            account.counter = max(account.counter, floor)

    def add(self, account: Account, amount: float) -> None:
        """Its tenant was served so much. No-op for the band if it has forgotten the account."""
        account.counter += amount
        if self.accounts.get(account.tenant_id) is account:
            self.lines.moved(account.tenant_id)

    def add_elsewhere(self, account: Account, amount: float) -> None:
        """Its tenant was served elsewhere: at most MAX_DEBT behind those who wait, and never before the first."""
        lowest = self.lowest
        floor = self.latest if lowest is None else lowest
        if amount > 0:
            moved = min(account.counter + amount, max(account.counter, floor + MAX_DEBT))
        else:
            moved = max(account.counter + amount, min(account.counter, floor))
        self.add(account, moved - account.counter)

    def leaves(self, account: Account) -> None:
        """One of the tenant's is let go, and will be charged: time has come to where the tenant stands now."""
        account.num_charged += 1
        self.latest = max(self.latest, account.counter)

    def catch_up(self, latest: float) -> None:
        """Others have come to `latest`. Who is in step with them goes on with their time. Who is far behind has counted
        alone, or has just begun: all its counters are moved, once, or whoever waits here would seem to have had little.

        Nobody's time is moved beyond the latest of all, so ingresses never chase each other.
        """
        behind = latest - self.latest
        if behind > (MAX_DEBT if self._joined else 0.0):
            self.shift(behind)
        self.latest = max(self.latest, latest)
        self._joined = True

    def shift(self, amount: float) -> None:
        """Moves the virtual time of everybody here by so much: the order stays what it is."""
        self.latest += amount
        for account in self.accounts.values():
            account.counter += amount
        self.lines.reorder()

    def prune(self, floor: float) -> None:
        """Forgets idle tenants that would be lifted in any case if they came back."""
        for account in list(self.accounts.values()):
            if account.tenant_id not in self.lines and not account.num_charged and account.counter <= floor:
                del self.accounts[account.tenant_id]

    def check(self) -> float:
        """Asserts that everything agrees; returns the cost of all who wait. For tests."""
        assert all(account.num_charged >= 0 for account in self.accounts.values())
        assert all(tenant_id in self.accounts for tenant_id in self.lines.tenants())
        return self.lines.check()
