"""A lease on a real Valkey: one holder at a time, whatever becomes of it or of the server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from routing.adapter_sources import FolderRecord, SourceBoard, SourceStatus
from routing.lease import Lease, LeaseOptions
from routing.store import Store, StoreError
from tests.routing.conftest import Valkey

QUICK = LeaseOptions(ttl_s=0.4)


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[Store]:
    made = Store(valkey.url, "c")
    yield made
    await made.close()


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about")


async def test_one_holds_it_and_another_takes_over_when_it_is_given_back(store: Store) -> None:
    one, two = (Lease(store, "x", name, LeaseOptions(ttl_s=3.0)) for name in ("one", "two"))
    one.start()
    await until(lambda: one.held)
    two.start()
    for _ in range(2):
        ends = one._until
        await until(lambda ends=ends: one._until > ends)  # it is renewed
        assert one.held and not two.held
    left_ms = await store.execute("PTTL", store.keys("lease", "x"))
    assert isinstance(left_ms, int) and left_ms > 1600, "of 3,000, half of which have passed since it was first held"
    await one.close()
    assert not one.held
    await until(lambda: two.held)
    await two.close()


async def test_a_holder_that_falls_silent_counts_itself_out_before_another_can_hold(store: Store) -> None:
    one, two = Lease(store, "x", "one", QUICK), Lease(store, "x", "two", LeaseOptions(ttl_s=30.0))
    await one.try_to_hold()
    while not two.held:
        await two.try_to_hold()
        assert not (two.held and one.held)
        await asyncio.sleep(0.005)
    await one.try_to_hold()
    assert not one.held


async def test_without_redis_nobody_holds_it_for_long(store: Store, valkey: Valkey) -> None:
    lease = Lease(store, "x", "one", QUICK)
    lease.start()
    await until(lambda: lease.held)
    valkey.kill()
    await until(lambda: not lease.held)
    await lease.close()


async def test_what_is_known_of_sources_is_kept_and_what_is_garbage_left_out(store: Store) -> None:
    board = SourceBoard(store)
    status = SourceStatus(url="s3://b/x", base_model="m", failed={"a": "why"})
    await board.tell(status)
    await board.note("s3://b/x", {n: FolderRecord(fingerprint=n, at=1.0) for n in ("a", "b")})
    await board.note("s3://b/x", {"a": None})
    await store.execute("HSET", store.keys("adapters", "sources"), "bad", b"{")
    assert await board.statuses() == {"s3://b/x": status}
    assert (await board.folders("s3://b/x")).keys() == {"b"} and await board.folders("s3://b/y") == {}


async def test_sources_that_no_profile_has_any_more_are_forgotten(store: Store) -> None:
    board = SourceBoard(store)
    for url in ("s3://b/x", "s3://b/y"):
        await board.tell(SourceStatus(url=url, base_model="m"))
    await board.keep_only({"s3://b/y"})
    assert (await board.statuses()).keys() == {"s3://b/y"}
    with contextlib.suppress(StoreError):
        await board.keep_only(set())
