"""Priority bands, virtual time, and several ingresses' queues that hear of each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ModelConfig
from gateway.fair_queue import MAX_IDLE_BANDS, NOWHERE_ELSE, Charge, Elsewhere, FairQueue
from gateway.tenant_lines import MAX_DEBT
from gateway.types import Job, Tenant
from replicas.contract import SamplingParams

MODEL = ModelConfig(id="m", source="sim:bytes")
_numbers = count()


@dataclass(eq=False)
class Asked:
    job: Job
    num_uncached: int


def asked(tenant: str, num_tokens: int = 98, priority: int = 0) -> Asked:
    """One that is charged `num_tokens` and 2 for its one output token."""
    sampling = SamplingParams(max_tokens=1, seed=0)
    job = Job(f"{tenant}{next(_numbers)}", MODEL, Tenant(tenant, b""), b"", sampling, b"", priority=priority)
    return Asked(job, num_tokens)


def serve(queue: FairQueue[Asked], *all_asked: Asked) -> Charge:
    """These come, and whoever is next goes each time; the last one's charge."""
    for each in all_asked:
        queue.push(each)
        _, charge = queue.pop()
        queue.settle(charge, each.num_uncached, 1)
    return charge


def tenants(queue: FairQueue[Asked], num: int) -> list[str]:
    """Whose the next ones are."""
    return [queue.pop()[0].job.tenant.tenant_id for _ in range(num)]


# Bands.


def test_a_starved_band_does_not_make_idle_tenants_of_an_urgent_one_rich() -> None:
    """`batch` waits at counter 0 for ever; `b` has been away while `a` worked, in the band above."""
    queue: FairQueue[Asked] = FairQueue()
    queue.push(asked("batch", priority=5))
    for _ in range(100):
        serve(queue, asked("a"))
    for tenant in "ab":
        for _ in range(20):
            queue.push(asked(tenant))
    served = tenants(queue, 20)
    assert 9 <= served.count("b") <= 11


def test_what_a_tenant_had_in_one_band_is_not_held_against_it_in_another() -> None:
    queue: FairQueue[Asked] = FairQueue()
    serve(queue, asked("a"), asked("a"), asked("a"))
    queue.push(asked("z", priority=5))
    serve(queue, asked("a"))
    queue.push(asked("a", priority=5))
    assert tenants(queue, 2) == ["a", "z"]
    assert (queue.counter("a"), queue.counter("a", 5)) == (400.0, 100.0)


def test_turns_are_filled_from_less_urgent_bands_each_with_its_own_bound() -> None:
    queue: FairQueue[Asked] = FairQueue()
    queue.push(asked("late", priority=7))
    queue.push(asked("urgent", 50))
    for tenant in "xxxy":
        queue.push(asked(tenant, priority=3))
    queue.served_elsewhere("y", 1000.0, priority=3)
    turns = queue.turns(6)
    assert [turn.priority for turn in turns] == [0, 3, 3, 3, 3, 7]
    assert [turn.first for turn in turns] == [True, True, False, False, False, True]
    assert all(turn.may_pass for turn in turns if turn.waiting.job.tenant.tenant_id != "y")
    assert not next(turn.may_pass for turn in turns if turn.waiting.job.tenant.tenant_id == "y")
    assert [turn.waiting for turn in queue.turns(2)] == [turn.waiting for turn in turns[:2]]
    assert queue.turns(0) == []


def test_a_band_yields_to_who_waits_in_it_elsewhere_and_to_no_other_band() -> None:
    queue: FairQueue[Asked] = FairQueue()
    for priority in (0, 5):
        serve(queue, *(asked("a", priority=priority) for _ in range(5)))
    for priority in (0, 5):
        queue.push(asked("a", priority=priority))
    queue.hear({5: Elsewhere(lowest=0.0)})
    assert [(turn.priority, turn.yields) for turn in queue.turns(2)] == [(0, False), (5, True)]


def test_bands_that_nobody_uses_are_forgotten_but_for_a_few() -> None:
    queue: FairQueue[Asked] = FairQueue()
    in_flight = asked("a", priority=-1)
    queue.push(in_flight)
    _, charge = queue.pop()
    queue.push(asked("waits", priority=5000))
    for priority in range(1000):
        serve(queue, asked("a", priority=priority))
        queue.served_elsewhere("b", 5.0, priority=2000 + priority)
    assert len(queue.latest) <= MAX_IDLE_BANDS + 3
    assert queue.num_accounts <= 2 * (MAX_IDLE_BANDS + 3)
    assert 5000 in queue.latest, "somebody waits there"
    assert -1 in queue.latest, "one of it is not settled yet"
    queue.settle(charge, 0, 0)
    queue.check()


# The other ingresses.


def test_who_was_served_elsewhere_had_waited_there_and_was_lifted_as_it_would_be_here() -> None:
    queue: FairQueue[Asked] = FairQueue()
    for _ in range(200):
        serve(queue, asked("c"))
    queue.served_elsewhere("a", 500.0)
    for tenant in "ba":
        for _ in range(9):
            queue.push(asked(tenant))
    assert "a" not in tenants(queue, 5)


def test_an_ingress_without_work_goes_on_with_the_time_of_the_others_and_owes_nobody() -> None:
    """All is served elsewhere for hours, a little between two tellings."""
    queue: FairQueue[Asked] = FairQueue()
    serve(queue, asked("a"))
    time = 100.0
    for _ in range(300):
        time += 10_000.0
        queue.served_elsewhere("a", 10_000.0)
        queue.hear({0: Elsewhere(latest=time)})
    assert queue.counter("a") - queue.latest[0] <= 20_000.0


def test_a_queue_in_which_nobody_was_served_catches_up_once() -> None:
    queue: FairQueue[Asked] = FairQueue()
    queue.push(asked("b"))
    for _ in range(4):
        queue.hear({0: Elsewhere(latest=2_000_000.0)})
        assert (queue.counter("b"), queue.latest) == (2_000_000.0, {0: 2_000_000.0})


def test_a_band_that_is_new_here_begins_where_the_others_are() -> None:
    queue: FairQueue[Asked] = FairQueue()
    queue.hear({0: Elsewhere(latest=5000.0), 3: Elsewhere(lowest=700.0, latest=900.0)})
    queue.push(asked("a"))
    queue.push(asked("a", priority=3))
    assert (queue.counter("a"), queue.counter("a", 3)) == (5000.0, 700.0)


def test_who_waits_elsewhere_in_vain_makes_newcomers_here_rich_only_within_bounds() -> None:
    queue: FairQueue[Asked] = FairQueue()
    queue.hear({0: Elsewhere(lowest=0.0, latest=50 * MAX_DEBT)})
    queue.push(asked("newcomer"))
    assert queue.counter("newcomer") == 49 * MAX_DEBT


Act: TypeAlias = tuple[str, int, int, int]


class Fleet:
    """Queues of several ingresses, and what each has yet to hear of the others' service."""

    def __init__(self, num: int) -> None:
        self.queues = [FairQueue[Asked](self._teller(number)) for number in range(num)]
        self.unheard: list[list[tuple[str, float, int]]] = [[] for _ in range(num)]
        self.charges: list[tuple[FairQueue[Asked], Charge]] = []

    def _teller(self, number: int) -> Callable[[int, str, float], None]:
        def tell(priority: int, tenant_id: str, amount: float) -> None:
            for other, unheard in enumerate(self.unheard):
                if other != number:
                    unheard.append((tenant_id, amount, priority))

        return tell

    def act(self, act: Act) -> None:
        kind, number, tenant, size = act
        queue = self.queues[number % len(self.queues)]
        if kind == "push":
            queue.push(asked("abc"[tenant], size, priority=size % 2))
        elif kind == "serve" and queue:
            self.charges.append((queue, queue.pop()[1]))
        elif kind == "settle" and self.charges:
            served_by, charge = self.charges.pop(0)
            served_by.settle(charge, size, tenant)
        elif kind == "sync":
            self.sync({n for n in range(len(self.queues)) if size >> n & 1})
        elif kind == "alone":
            queue.hear({})

    def sync(self, reached: set[int]) -> None:
        """Those who reach Redis tell, then they hear; they are the only ones that are not silent."""
        told = {n: (self.queues[n].lowest, self.queues[n].latest) for n in reached}
        for number in reached:
            for tenant_id, amount, priority in self.unheard[number]:
                self.queues[number].served_elsewhere(tenant_id, amount, priority)
            self.unheard[number].clear()
            elsewhere: dict[int, Elsewhere] = {}
            for other in reached - {number}:
                lowest, latest = told[other]
                for priority, time in latest.items():
                    known = elsewhere.get(priority, NOWHERE_ELSE)
                    waiting = [x for x in (known.lowest, lowest.get(priority)) if x is not None]
                    elsewhere[priority] = Elsewhere(min(waiting, default=None), max(known.latest, time))
            self.queues[number].hear(elsewhere)

    def times(self) -> list[object]:
        return [(queue.latest, {(t, p): queue.counter(t, p) for t in "abc" for p in (0, 1)}) for queue in self.queues]


@settings(max_examples=60, deadline=None)
@given(
    acts=st.lists(
        st.tuples(
            st.sampled_from(("push", "push", "serve", "serve", "settle", "sync", "alone")),
            st.integers(0, 2),
            st.integers(0, 2),
            st.sampled_from((0, 1, 2, 3, 5, 6, 7, 100, 70_001, 900_000, 5_000_000)),
        ),
        max_size=60,
    )
)
def test_ingresses_that_hear_of_each_other_again_settle_at_once_and_never_chase_each_other(acts: list[Act]) -> None:
    fleet = Fleet(3)
    for act in acts:
        fleet.act(act)
    everybody = {0, 1, 2}
    latest = {p: max(q.latest.get(p, 0.0) for q in fleet.queues) for p in (0, 1)}
    fleet.sync(everybody)
    times = fleet.times()
    fleet.sync(everybody)
    elsewhere = [queue.elsewhere for queue in fleet.queues]
    for _ in range(3):
        assert fleet.times() == times
        fleet.sync(everybody)
        assert [queue.elsewhere for queue in fleet.queues] == elsewhere
    for queue in fleet.queues:
        queue.check()
        for priority, time in queue.latest.items():
            assert time == pytest.approx(latest[priority]), "time was neither made nor left behind"
