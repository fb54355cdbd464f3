"""Two ingresses share what tenants were served and what they may have, through a real Valkey."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from configs.schema import TenantConfig
from gateway.errors import RateLimitError
from gateway.fleet_shares import MAX_TOLD_BANDS, FleetShares
from gateway.tenancy import Tenants
from gateway.tenant_lines import MAX_DEBT
from gateway.types import Job, Tenant
from routing.shared_counts import SharedCounts, SharedCountsOptions
from routing.store import Store, StoreError, StoreOptions
from tests.gateway.test_admission import Desk, job
from tests.routing.conftest import Valkey

TENANTS = (
    TenantConfig(id="a", keys=("ka",), requests_per_minute=10, tokens_per_minute=1000, max_concurrent=3),
    TenantConfig(id="b", keys=("kb",)),
)


class Ingress:
    """Admission, quotas and counts of one ingress, on one clock with the others."""

    def __init__(self, valkey: Valkey, name: str) -> None:
        self.desk = Desk(max_queued=4000)
        self.tenants = Tenants(TENANTS, b"secret", lambda: self.desk.now)
        self.store = Store(valkey.url, "c", StoreOptions(timeout_s=1.0, max_failures=1000))
        options = SharedCountsOptions(clock=lambda: self.desk.now)
        self.counts = SharedCounts(self.store, name, b"secret", options)
        FleetShares(self.counts, self.desk.admission, self.tenants)

    def tenant(self, tenant_id: str) -> Tenant:
        return next(q.tenant for q in self.tenants.quotas() if q.tenant.tenant_id == tenant_id)

    async def serve(self, *asked: Job) -> None:
        """These get a place each, one after the other."""
        for one in asked:
            await self.desk.ask(one)
            await self.desk.free_one()

    def counter(self, tenant_id: str) -> float:
        return self.desk.admission._lines["m"].queue.counter(tenant_id)


class Pair:
    """`one` and `two`."""

    def __init__(self, valkey: Valkey) -> None:
        self.valkey = valkey
        self.one = Ingress(valkey, "one")
        self.two = Ingress(valkey, "two")

    async def sync(self) -> None:
        """Both tell, then both listen."""
        for _ in range(2):
            for ingress in (self.one, self.two):
                ingress.desk.now += 0.1
                with suppress(StoreError):
                    await ingress.counts.refresh()


@pytest.fixture
async def pair(valkey: Valkey) -> AsyncIterator[Pair]:
    made = Pair(valkey)
    try:
        await made.sync()
        yield made
    finally:
        for ingress in (made.one, made.two):
            await ingress.desk.finish()
            await ingress.counts.close()
            await ingress.store.close()


async def test_what_one_ingress_served_counts_at_the_other(pair: Pair) -> None:
    for tenant_id in ("a", "b"):
        await pair.two.desk.ask(job(tenant_id))
    await pair.sync()
    await pair.one.serve(job("a"), job("a"), job("a"))
    await pair.sync()
    await pair.two.desk.free_one()
    assert pair.two.desk.order == ["b"], "a has had three at the other ingress"


async def test_tenants_that_always_wait_at_both_are_served_alike_over_all(pair: Pair) -> None:
    """`a` asks at both, `b` at one only: each gets half of all places, not `a` three quarters."""
    served = {"a": 0, "b": 0}
    for ingress in (pair.one, pair.two):
        for _ in range(60):
            await ingress.desk.ask(job("a"))
    for _ in range(60):
        await pair.two.desk.ask(job("b"))
    for _ in range(40):
        for ingress in (pair.one, pair.two):
            await ingress.desk.free_one()
        await pair.sync()
    for ingress in (pair.one, pair.two):
        for tenant_id in ingress.desk.order:
            served[tenant_id] += 1
    assert served["a"] + served["b"] == 80
    assert abs(served["a"] - served["b"]) <= 4, served


async def test_an_ingress_that_starts_late_begins_where_the_others_are(pair: Pair) -> None:
    await pair.one.serve(*[job("a") for _ in range(10)])
    await pair.sync()
    await pair.two.desk.ask(job("b"))
    await pair.sync()
    line = pair.two.desk.admission._lines["m"].queue
    assert line.lowest[0] >= pair.one.counter("a") - 400


async def test_who_has_had_less_elsewhere_is_left_a_place(pair: Pair) -> None:
    await pair.one.serve(*[job("a") for _ in range(5)])
    await pair.sync()
    queue = pair.one.desk.admission._lines["m"].queue
    await pair.one.desk.ask(job("a"))
    assert not queue.turns(1)[0].yields
    await pair.two.desk.ask(job("b"))
    pair.two.desk.admission._lines["m"].queue.shift(-10_000.0)
    await pair.sync()
    assert queue.turns(1)[0].yields
    await pair.two.desk.free_one()
    await pair.sync()
    assert not queue.turns(1)[0].yields, "nobody waits there any more"


async def test_an_ingress_that_counted_alone_for_long_comes_back_to_the_others(pair: Pair) -> None:
    await pair.one.serve(job("a"))
    await pair.two.serve(job("a"))
    await pair.sync()
    pair.valkey.signal(signal.SIGSTOP)
    try:
        pair.one.desk.admission._lines["m"].queue.shift(3 * MAX_DEBT)
    finally:
        pair.valkey.signal(signal.SIGCONT)
    await pair.sync()
    assert pair.two.counter("a") > 2 * MAX_DEBT


async def test_an_ingress_where_nobody_was_served_yet_is_moved_to_the_others_once(pair: Pair) -> None:
    await pair.one.serve(job("a"))
    pair.one.desk.admission._lines["m"].queue.shift(2 * MAX_DEBT)
    await pair.two.desk.ask(job("b"))
    counters = []
    for _ in range(4):
        await pair.sync()
        counters.append(pair.two.counter("b"))
    assert counters[0] >= 2 * MAX_DEBT
    assert counters == counters[:1] * 4


async def test_who_waits_in_a_less_urgent_band_elsewhere_is_left_no_place(pair: Pair) -> None:
    await pair.two.desk.ask(job("b", priority=5))
    for priority in (0, 5):
        await pair.one.serve(*[job("a", priority=priority) for _ in range(5)])
    for priority in (0, 5):
        await pair.one.desk.ask(job("a", priority=priority))
    await pair.sync()
    turns = pair.one.desk.admission._lines["m"].queue.turns(2)
    assert [(turn.priority, turn.yields) for turn in turns] == [(0, False), (5, True)]


async def test_of_many_priorities_the_most_urgent_are_told(pair: Pair) -> None:
    for priority in range(3 * MAX_TOLD_BANDS, 0, -1):
        await pair.two.desk.ask(job("b", priority=priority))
    await pair.one.desk.ask(job("a"))
    await pair.sync()
    elsewhere = pair.one.desk.admission._lines["m"].queue.elsewhere
    assert sorted(elsewhere) == list(range(1, MAX_TOLD_BANDS + 1))


async def test_without_redis_nobody_is_left_a_place_for_ever_and_idle_tenants_are_lifted(pair: Pair) -> None:
    """When Redis went, `b` waited at the other ingress."""
    await pair.one.serve(job("a"))
    await pair.two.desk.ask(job("b"))
    await pair.sync()
    queue = pair.one.desk.admission._lines["m"].queue
    assert queue.elsewhere[0].lowest is not None
    pair.valkey.kill()
    await pair.one.serve(*[job("a") for _ in range(20)])
    await pair.one.desk.ask(job("a"))
    pair.one.desk.now += 5.0
    await pair.sync()
    assert not queue.turns(1)[0].yields
    await pair.one.desk.ask(job("b"))
    assert pair.one.counter("b") == pair.one.counter("a")


async def test_requests_and_tokens_a_minute_hold_over_all_ingresses(pair: Pair) -> None:
    one, two = (ingress.tenants.quota(ingress.tenant("a")) for ingress in (pair.one, pair.two))
    for _ in range(6):
        one.enter().close(0)
    await pair.sync()
    for _ in range(4):
        two.enter().close(0)
    with pytest.raises(RateLimitError, match="requests"):
        two.enter()


async def test_requests_at_once_hold_over_all_ingresses_until_one_is_gone(pair: Pair) -> None:
    one, two = (ingress.tenants.quota(ingress.tenant("a")) for ingress in (pair.one, pair.two))
    leases = [one.enter(), one.enter()]
    await pair.sync()
    lease = two.enter()
    with pytest.raises(RateLimitError, match="3 requests in progress"):
        two.enter()
    pair.two.desk.now += 5.0
    two.enter().close(0)
    for open_one in (*leases, lease):
        open_one.close(0)


async def test_without_redis_every_ingress_goes_on_by_itself(pair: Pair) -> None:
    pair.valkey.kill()
    quota = pair.one.tenants.quota(pair.one.tenant("a"))
    for _ in range(10):
        quota.enter().close(0)
    with pytest.raises(RateLimitError):
        quota.enter()
    await pair.one.serve(job("a"), job("b"))
    assert sorted(pair.one.desk.order) == ["a", "b"]
