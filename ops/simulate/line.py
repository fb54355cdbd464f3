"""Who waits at a simulated replica, in the order of the replicas' own `replicas.engine.order`.

As in `replicas.engine.ranking`: what the cache holds of a waiting prompt is looked at again while it waits, a few
prompts in turn with every step and whoever is next when it is its turn, and with it the prompt moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import islice

from ops.simulate.cache import PagedCache
from ops.simulate.pending import LearntRates, PendingSizes
from ops.simulate.work import Work
from replicas.engine.order import BY_SIZE, ORDERS, OrderKey, OrderName, finish_tag, not_before, order_key
from replicas.engine.scheduler import REFRESHED_PER_STEP


class WaitingLine:
    """Every request from its arrival to its admission. `pending` counts them by size.

    Members are in `_members`; the heap may hold entries with keys they had before.
    """

    def __init__(self, order: OrderName, cache: PagedCache, rates: LearntRates) -> None:
        self.pending = PendingSizes()
        self._by_size = order in BY_SIZE
        self._due = ORDERS[order]
        self._cache = cache
        self._rates = rates
        self._num_entered = 0
        self._members: dict[int, Work] = {}
        self._tenants: dict[str, dict[int, Work]] = {}
        self._heap: list[tuple[OrderKey, Work]] = []

    def enter(self, work: Work, now: float) -> None:
        """A request arrives; it may be taken once it is `ready`."""
        work.arrival = now
        work.number = self._num_entered
        self._num_entered += 1
        work.reach = self._cache.match(work.request.blocks)
        work.num_expected = self._uncached(work)
        self._rates.arrived(work.num_expected)
        if self._by_size:
            work.not_before = not_before(finish_tag(work, work.num_expected), self._rivals(work))
            self._tenants.setdefault(work.request.tenant, {})[work.number] = work
        self._place(work)
        self.pending.add(work.num_expected)

    def ready(self, work: Work) -> None:
        """It can be taken from now on."""
        self._members[work.number] = work
        heappush(self._heap, (work.key, work))

    def peek(self) -> Work | None:
        """Who goes next, by what the cache holds now; its `reach` is up to date."""
        heap, members = self._heap, self._members
        while heap:
            key, work = heap[0]
            if work.number not in members or work.key is not key:
                heappop(heap)
            elif not self.refresh(work):
                return work
        return None

    def take(self, work: Work) -> None:
        """It is admitted."""
        del self._members[work.number]
        self.pending.add(work.num_expected, -1)

    def leave(self, work: Work) -> None:
        """Its prompt is computed: other tenants need not mind it any more."""
        if self._by_size:
            line = self._tenants[work.request.tenant]
            del line[work.number]
            if not line:
                del self._tenants[work.request.tenant]

    def refresh_some(self, num_steps: int) -> None:
        """Looks at as many waiting requests again as so many steps would have."""
        members = self._members
        if not members:
            return
        for number in list(islice(members, REFRESHED_PER_STEP * num_steps)):
            work = members.pop(number)
            members[number] = work
            self.refresh(work)

    def refresh(self, work: Work) -> bool:
        """Moves a waiting request to where it belongs by what the cache holds of it now; whether it moved."""
        blocks, cache, reach = work.request.blocks, self._cache, work.reach
        shrunk = reach > 0 and blocks[reach - 1] not in cache  # tails go first: the last one there, all are
        if shrunk or (reach < len(blocks) and blocks[reach] in cache):
            work.reach = cache.match(blocks)
        if work.reach == reach:
            return False
        self.pending.add(work.num_expected, -1)
        work.num_expected = self._uncached(work)
        self.pending.add(work.num_expected)
        if not self._by_size:
            return False
        before = work.key
        self._place(work)
        if work.key == before:
            work.key = before
            return False
        heappush(self._heap, (work.key, work))
        return True

    def _place(self, work: Work) -> None:
        work.due = max(self._due(work, work.arrival, work.num_expected, self._rates.pace), work.not_before)
        work.key = order_key(work.due, work.fair_tag, work.number)

    def _uncached(self, work: Work) -> int:
        matched = work.reach * self._cache.block_tokens
        return work.request.num_prompt - min(matched, work.request.num_prompt - 1)

    def _rivals(self, work: Work) -> Iterator[tuple[float, float]]:
        """(finish tag, due) of every pending prompt of other tenants in the same priority band."""
        for tenant, line in self._tenants.items():
            if tenant != work.request.tenant:
                for rival in line.values():
                    if rival.priority == work.priority:
                        yield finish_tag(rival, rival.num_expected), rival.due
