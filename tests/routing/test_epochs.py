"""Numbers of starts grow, whatever clocks and Redis say."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest

from routing.epochs import MAX_EPOCH, next_epoch
from routing.kv_events import KvKeys
from routing.registry import Withdrawn
from routing.store import Store, StoreReplyError, StoreUnavailableError
from tests.routing.conftest import Valkey

NOW = 1_000.0
CLOCK = 1_000_000_000
"""`NOW` in microseconds."""


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[Store]:
    store = Store(valkey.url, "test")
    yield store
    await store.close()


@pytest.mark.parametrize(
    ("told", "streamed", "epoch"),
    [
        (None, None, CLOCK),
        (CLOCK - 5, CLOCK - 3, CLOCK),
        (CLOCK, None, CLOCK + 1),
        (CLOCK + 7, CLOCK + 3, CLOCK + 8),
        (CLOCK - 7, CLOCK + 3, CLOCK + 4),
        (CLOCK + 7, MAX_EPOCH, CLOCK + 8),
        (MAX_EPOCH, None, CLOCK),
    ],
)
async def test_an_epoch_is_later_than_what_redis_still_holds(
    store: Store, told: int | None, streamed: int | None, epoch: int
) -> None:
    if told is not None:
        word = msgspec.json.encode(Withdrawn(replica_id="r", epoch=told))
        await store.execute("SET", store.keys("member", "r"), word)
    if streamed is not None:
        await store.execute("XADD", KvKeys(store.keys, "r").stream, f"{streamed}-3", "b", "x")
    assert await next_epoch(store, "r", NOW) == epoch
    assert await next_epoch(store, "another", NOW) == CLOCK


async def test_what_makes_no_sense_leaves_it_to_the_clock(store: Store) -> None:
    await store.execute("SET", store.keys("member", "r"), b"\xff no word")
    await store.execute("SET", KvKeys(store.keys, "r").stream, "no stream")
    assert await next_epoch(store, "r", NOW) == CLOCK


async def test_a_redis_that_answers_with_an_error_has_not_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = StoreReplyError("BUSY Valkey is busy running a script")

    async def pipeline(self: Store, commands: object) -> list[object]:
        return [None, busy]

    monkeypatch.setattr(Store, "pipeline", pipeline)
    with pytest.raises(StoreReplyError):
        await next_epoch(store, "r", NOW)


async def test_without_redis_there_is_none(store: Store, valkey: Valkey) -> None:
    valkey.kill()
    with pytest.raises(StoreUnavailableError):
        await next_epoch(store, "r", NOW)
