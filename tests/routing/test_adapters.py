"""The catalogue of adapters: over a real Valkey that is killed, emptied and filled with garbage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import routing.adapters as adapters_module
from configs.schema import AdapterConfig
from routing.adapter_watch import AdapterWatch, AdapterWatchOptions
from routing.adapters import (
    FORGET_S,
    FORGOTTEN,
    Adapter,
    AdapterConflictError,
    AdapterRegistry,
    Catalogue,
    Entry,
    declared,
    next_version,
)
from routing.store import Store, StoreOptions, StoreUnavailableError
from tests.routing.conftest import Valkey

FAST = AdapterWatchOptions(poll_s=0.01, reread_s=0.2)


def adapter(name: str = "a", version: str = "1", **fields: object) -> Adapter:
    return Adapter(name=name, base_model="m", version=version, **fields)  # type: ignore[arg-type]


class Stores:
    """Connections to the test's own Valkey, one a call."""

    def __init__(self, valkey: Valkey) -> None:
        self.valkey = valkey
        self.opened: list[Store] = []

    def __call__(self, cluster: str = "c") -> Store:
        options = StoreOptions(timeout_s=2.0, max_failures=1, open_s=0.01)
        self.opened.append(Store(self.valkey.url, cluster, options))
        return self.opened[-1]


@pytest.fixture
async def stores(valkey: Valkey) -> AsyncIterator[Stores]:
    stores = Stores(valkey)
    yield stores
    for store in stores.opened:
        await store.close()


async def until(holds: object, seconds: float = 5.0) -> None:
    assert callable(holds)
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def test_the_last_version_written_is_the_one_a_name_means() -> None:
    entries = [Entry(adapter=adapter(version=str(v)), at_us=at) for v, at in ((1, 10), (2, 30), (3, 20))]
    catalogue = Catalogue(entries)
    assert catalogue.named("a") == adapter(version="2")
    assert catalogue.named("a@3") == catalogue.find("a@3") == adapter(version="3")
    assert catalogue.find("a") is None and catalogue.named("b") is None
    assert [a.adapter_id for a in catalogue] == ["a@1", "a@2", "a@3"] and len(catalogue.current()) == 1


def test_a_profile_s_adapters_are_older_than_any_that_was_added() -> None:
    own = declared([AdapterConfig(name="a", base_model="m", version=v) for v in ("2", "1")])
    assert Catalogue(own).named("a") == adapter(version="1"), "the last of a name"
    added = Entry(adapter=adapter(version="2"), at_us=1_700_000_000_000_000)
    assert Catalogue([*own, added]).named("a") == adapter(version="2")


@given(st.permutations([(1, False, 3), (1, True, 7), (2, False, 5), (2, False, 1)]))
@settings(max_examples=24, deadline=None)
def test_merged_in_any_order_the_latest_word_about_each_version_counts(words: list[tuple[int, bool, int]]) -> None:
    merged: dict[int, Entry] = {}
    for version, removed, at_us in words:
        entry = Entry(adapter=adapter(version=str(version)), at_us=at_us, removed=removed)
        if version not in merged or merged[version].at_us < at_us:
            merged[version] = entry
    assert [a.adapter_id for a in Catalogue(merged.values())] == ["a@2"]


async def test_an_adapter_added_elsewhere_is_seen_and_one_removed_is_gone(stores: Stores) -> None:
    registry, watch = AdapterRegistry(stores()), AdapterWatch(stores(), (), FAST)
    watch.start()
    await registry.add(adapter(rank=16, owner="acme", path="/x", num_bytes=5))
    await until(lambda: watch.catalogue.named("a"))
    assert watch.catalogue.named("a") == adapter(rank=16, owner="acme", path="/x", num_bytes=5)
    await registry.add(adapter(version="2"))
    await until(lambda: watch.catalogue.named("a") == adapter(version="2"))
    assert [a.adapter_id for a in await registry.remove("a@2")] == ["a@2"]
    await until(lambda: watch.catalogue.named("a") == adapter(rank=16, owner="acme", path="/x", num_bytes=5))
    await registry.remove("a")
    await until(lambda: not len(watch.catalogue))
    await watch.close()


async def test_a_version_keeps_its_weights_for_ever(stores: Stores) -> None:
    registry = AdapterRegistry(stores())
    await registry.add(adapter(path="/one"))
    with pytest.raises(AdapterConflictError, match=r"a@1 exists with other weights.*path /one"):
        await registry.add(adapter(path="/two"))
    await registry.remove("a@1")
    with pytest.raises(AdapterConflictError, match="other weights"):
        await registry.add(adapter(path="/two"))
    await registry.add(adapter(path="/one", owner="acme"))
    assert [e.adapter.owner for e in (await registry.read()).values()] == ["acme"]
    with pytest.raises(AdapterConflictError, match="no adapter 'b'"):
        await registry.remove("b")


async def test_a_clock_that_is_behind_loses_no_write(stores: Stores) -> None:
    ahead, behind = (AdapterRegistry(stores(), lambda at=at: at) for at in (2e9, 1e9))  # type: ignore[misc]
    await ahead.add(adapter(version="1"))
    await behind.add(adapter(version="2"))
    assert Catalogue((await ahead.read()).values()).named("a") == adapter(version="2")
    await behind.remove("a@2")
    assert Catalogue((await ahead.read()).values()).named("a") == adapter(version="1")


async def test_an_emptied_redis_gets_its_adapters_back_and_one_added_meanwhile_stays(stores: Stores) -> None:
    registry = AdapterRegistry(stores())
    for name in ("a", "b", "gone"):
        await registry.add(adapter(name))
    await registry.remove("gone")
    watch = AdapterWatch(stores(), (), FAST)
    await watch.refresh()
    assert stores.valkey.raw("FLUSHALL") == b"+OK\r\n"
    await registry.add(adapter("new"))
    watch.start()
    await until(lambda: watch.catalogue.named("new"))
    assert [a.name for a in watch.catalogue.current()] == ["a", "b", "new"]
    await watch.close()
    again = AdapterWatch(stores(), (), FAST)
    await again.refresh()
    assert [a.name for a in again.catalogue.current()] == ["a", "b", "new"], "what was removed stays so"


async def test_while_redis_is_down_the_last_copy_and_the_profile_s_adapters_stay(stores: Stores) -> None:
    await AdapterRegistry(stores()).add(adapter("shared"))
    own = declared([AdapterConfig(name="own", base_model="m")])
    watch = AdapterWatch(stores(), own, FAST)
    assert watch.catalogue.named("own")
    watch.start()
    await until(lambda: watch.catalogue.named("shared"))
    stores.valkey.kill()
    with pytest.raises(StoreUnavailableError):
        await watch.refresh()
    await asyncio.sleep(0.3)
    assert watch.catalogue.named("shared") and watch.catalogue.named("own")
    await watch.close()


async def test_garbage_in_the_hash_hides_nothing_else(stores: Stores) -> None:
    registry = AdapterRegistry(stores())
    await registry.add(adapter("good"))
    key = "wg:{c}:adapters"
    forged = msgspec.json.encode(Entry(adapter=adapter("good"), at_us=1))
    for name, value in (("x@1", b"{"), (b"\xff@1", forged), ("y@1", forged), ("z@1", b'{"adapter":{},"at_us":1}')):
        stores.valkey.raw("HSET", key, name, value)
    assert list(await registry.read()) == ["good@1"]


async def test_news_that_nobody_stamped_are_found_by_the_regular_reading(stores: Stores) -> None:
    watch = AdapterWatch(stores(), (), FAST)
    watch.start()
    await asyncio.sleep(0.05)
    stores.valkey.raw("HSET", "wg:{c}:adapters", "a@1", msgspec.json.encode(Entry(adapter=adapter(), at_us=1)))
    await until(lambda: watch.catalogue.named("a"))
    await watch.close()


async def test_two_clusters_on_one_redis_share_no_adapter(stores: Stores) -> None:
    await AdapterRegistry(stores("one")).add(adapter())
    assert await AdapterRegistry(stores("two")).read() == {}


async def test_an_offered_version_is_not_what_its_name_means_until_it_is_added(stores: Stores) -> None:
    registry = AdapterRegistry(stores())
    await registry.add(adapter("a", "1"))
    await registry.offer(adapter("a", "2", path="/new"))
    catalogue = Catalogue((await registry.read()).values())
    assert [a.version for a in catalogue.versions("a")] == ["2", "1"]
    assert (found := catalogue.named("a")) is not None and found.version == "1"
    assert (found := catalogue.named("a@2")) is not None and found.path == "/new"
    await registry.add(adapter("a", "2", path="/new"))
    assert (found := Catalogue((await registry.read()).values()).named("a")) is not None and found.version == "2"
    with pytest.raises(AdapterConflictError, match="other weights"):
        await registry.offer(adapter("a", "1", path="/other"))


async def test_an_offer_of_a_new_name_is_not_seen_under_that_name(stores: Stores) -> None:
    registry = AdapterRegistry(stores())
    await registry.offer(adapter("new"))
    catalogue = Catalogue((await registry.read()).values())
    assert catalogue.named("new") is None and catalogue.current() == []
    assert catalogue.find("new@1") == adapter("new")
    await registry.add(adapter("new"))
    assert Catalogue((await registry.read()).values()).named("new") == adapter("new")


async def test_an_offer_never_comes_before_a_profile_s_adapter(stores: Stores) -> None:
    watch = AdapterWatch(stores(), declared([AdapterConfig(name="a", base_model="m")]), FAST)
    await AdapterRegistry(stores()).offer(adapter("a", "2"))
    await watch.refresh()
    assert (found := watch.catalogue.named("a")) is not None and found.version == "1"


async def test_an_adapter_of_a_profile_can_be_removed_and_stays_removed(stores: Stores) -> None:
    own = declared([AdapterConfig(name="own", base_model="m"), AdapterConfig(name="other", base_model="m")])
    watch, sibling = (AdapterWatch(stores(), own, FAST) for _ in range(2))
    registry = AdapterRegistry(stores())
    with pytest.raises(AdapterConflictError):
        await registry.remove("own")
    assert [a.adapter_id for a in await registry.remove("own", watch.catalogue)] == ["own@1"]
    for each in (watch, sibling):
        await each.refresh()
        assert [a.name for a in each.catalogue.current()] == ["other"]


async def test_a_removal_is_forgotten_after_hours_and_nobody_brings_it_back(stores: Stores) -> None:
    now = [1_000_000.0]
    registry = AdapterRegistry(stores(), lambda: now[0])
    for version in ("1", "2"):
        await registry.add(adapter("a", version))
    watch = AdapterWatch(stores(), (), replace(FAST, wall_clock=lambda: now[0]))
    await registry.remove("a@1")
    await watch.refresh()
    now[0] += FORGET_S - 1
    await registry.add(adapter("b"))
    assert set(await registry.read()) == {"a@1", "a@2", "b@1"}
    now[0] += 2
    await registry.add(adapter("c"))
    assert set(await registry.read()) == {"a@2", "b@1", "c@1", f"{FORGOTTEN}@1"}, "only the removal goes"
    await watch.refresh()
    assert set(await registry.read()) == {"a@2", "b@1", "c@1", f"{FORGOTTEN}@1"}
    assert [a.name for a in watch.catalogue] == ["a", "b", "c"]


async def test_a_version_never_returns_even_when_its_removal_is_forgotten(stores: Stores) -> None:
    now = [1_000_000.0]
    registry = AdapterRegistry(stores(), lambda: now[0])
    watch = AdapterWatch(stores(), (), replace(FAST, wall_clock=lambda: now[0]))
    for version in ("1", "4"):
        await registry.add(adapter("a", version))
    await registry.remove("a")
    now[0] += FORGET_S + 1
    await registry.add(adapter("b"))
    assert next_version("a", await registry.read()) == "5"
    await registry.remove("b")
    now[0] += FORGET_S + 1
    await registry.add(adapter("c", "2"))
    assert next_version("b", await registry.read()) == "5", "a number that nothing forgotten had"
    await watch.refresh()
    assert stores.valkey.raw("FLUSHALL") == b"+OK\r\n"
    await watch.refresh()
    assert next_version("a", await registry.read()) == "5", "an emptied Redis gets the number back"
    await registry.add(adapter("d", "9"))
    await registry.remove("d")
    now[0] += FORGET_S + 1
    await registry.add(adapter("e"))
    assert set(await registry.read()) == {"c@2", "e@1", f"{FORGOTTEN}@9"}, "one number is enough"
    with pytest.raises(AdapterConflictError, match="reserved"):
        await registry.add(adapter(FORGOTTEN))


async def test_removals_never_fill_the_catalogue(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MAX_ADAPTERS", 3), ("MAX_REMOVALS", 4), ("MAX_ENTRIES", 12)):
        monkeypatch.setattr(adapters_module, name, value)
    registry, watch = AdapterRegistry(stores()), AdapterWatch(stores(), (), replace(FAST, reread_s=0.0))
    for number in range(1, 20):
        await registry.add(adapter("x", str(number)))
        await watch.refresh()
        await registry.remove("x")
        await watch.refresh()
    kept = {*(f"x@{number}" for number in range(16, 20)), f"{FORGOTTEN}@15"}
    assert set(await registry.read()) == kept, "and no watcher brings others back"
    assert next_version("x", await registry.read()) == "20" and next_version("new", await registry.read()) == "16"
    for name in "abc":
        await registry.add(adapter(name))
    with pytest.raises(AdapterConflictError, match="the catalogue is full: 3 adapters; remove some"):
        await registry.add(adapter("d"))
    await registry.remove("a")
    await registry.add(adapter("d"))


def test_the_next_version_is_one_that_never_was() -> None:
    entries = {
        "a@1": Entry(adapter=adapter("a", "1"), at_us=1, removed=True),
        "a@7": Entry(adapter=adapter("a", "7"), at_us=2),
        "a@beta": Entry(adapter=adapter("a", "beta"), at_us=3),
        "b@90": Entry(adapter=adapter("b", "90"), at_us=4),
    }
    assert next_version("a", entries) == "8"
    assert next_version("a", entries, [adapter("a", "12")]) == "13"
    assert next_version("new", entries) == "1"


async def test_a_digest_tells_other_weights_where_both_sides_know_one(stores: Stores) -> None:
    registry = AdapterRegistry(stores())
    await registry.add(adapter("a", digest="x"))
    await registry.add(adapter("a"))
    await registry.add(adapter("a", digest="x"))
    with pytest.raises(AdapterConflictError):
        await registry.add(adapter("a", digest="y"))
