"""The KV registry over a real Valkey that loses, reorders, freezes, restarts and lies."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from routing.index import EXPECT_S
from routing.store import Command, Reply, Store, StoreError, StoreUnavailableError
from tests.routing.conftest import Valkey
from tests.routing.kv_kit import Ingress, Replica, hashes, prompt, store_for

P = [prompt(i) for i in range(10)]


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[Store]:
    store = store_for(valkey.url)
    yield store
    await store.close()


@pytest.fixture
async def other(valkey: Valkey) -> AsyncIterator[Store]:
    """Another cluster on the same Redis."""
    store = store_for(valkey.url, "other")
    yield store
    await store.close()


async def started(store: Store) -> tuple[Replica, Ingress]:
    """A replica that holds the first two prompts, and an ingress that knows."""
    replica = Replica(store, "a")
    replica.compute(P[0], P[1])
    await replica.publish()
    ingress = Ingress(store, replica)
    await ingress.heal()
    assert ingress.agrees(*P)
    assert ingress.index.match(hashes(P[0])) == {"a": 10}
    return replica, ingress


async def until(holds: Callable[[], bool], seconds: float) -> float:
    """Waits; returns how long it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


async def test_every_ingress_knows_what_every_replica_holds(store: Store) -> None:
    replicas = [Replica(store, name, epoch=i + 1) for i, name in enumerate("abcd")]
    ingresses = [Ingress(store, *replicas) for _ in range(2)]
    for i, replica in enumerate(replicas):
        replica.compute(*P[i : i + 3])
        await replica.publish()
    for ingress in ingresses:
        await ingress.heal()
        assert ingress.agrees(*P)
    replicas[0].forget()
    replicas[1].compute(P[8], P[9])
    replicas[2].pool.clear()
    for _ in range(2):
        for replica in replicas:
            await replica.publish()
    for ingress in ingresses:
        await ingress.heal(*replicas)
        assert ingress.agrees(*P)
        assert ingress.index.match(hashes(P[8])) == {"b": 10}
        assert not any(map(ingress.index.may_have_gaps, "abcd")), "the pools' publishers vouch for them"


async def test_changes_arrive_in_one_round_trip_and_one_round(store: Store) -> None:
    replica, ingress = await started(store)
    for tokens in P[2:]:
        replica.compute(tokens)
        await replica.publish()
        await ingress.read()
        assert ingress.agrees(*P)
    assert not ingress.registry.num_lost
    assert ingress.registry.num_heals == 1


async def test_a_new_ingress_knows_what_its_siblings_know_from_its_first_round(store: Store) -> None:
    replica, sibling = await started(store)
    for tokens in P[2:6]:
        replica.compute(tokens)
        await replica.publish()
        await sibling.read()
    fresh = Ingress(store, replica)
    await fresh.read()
    assert fresh.index.is_exact("a")
    for tokens in P:
        assert fresh.index.match(hashes(tokens)) == sibling.index.match(hashes(tokens))


async def test_lost_events_are_healed_from_the_snapshot(store: Store, valkey: Valkey) -> None:
    replica, ingress = await started(store)
    for tokens in P[2:4]:
        replica.compute(tokens)
        await replica.publish()
    (lost,) = await store.execute("XREVRANGE", replica.keys.stream, f"{replica.epoch}-2", "-", "COUNT", 1)
    await store.execute("XDEL", replica.keys.stream, lost[0])
    await ingress.read()
    assert ingress.registry.num_lost == {"gap": 1}
    await ingress.heal(replica)
    assert ingress.agrees(*P)


async def test_while_it_is_lost_a_replica_is_mirrored_and_nothing_of_it_is_certain(store: Store) -> None:
    replica, ingress = await started(store)
    replica.compute(P[2])
    await replica.publish()
    replica.compute(P[3])
    await replica.publish()
    await store.execute("XTRIM", replica.keys.stream, "MAXLEN", 1)
    await store.execute("DEL", replica.keys.snapshot)
    await ingress.read()
    assert ingress.index.guessed == {"a"}
    assert ingress.index.match(hashes(P[0])) == {"a": 10}, "a guess is better than nothing"
    ingress.index.sent("a", hashes(P[7]), now=ingress.clock())
    assert ingress.index.match(hashes(P[7])) == {"a": 10}
    await ingress.heal(replica)
    assert ingress.agrees(*P)


@pytest.mark.parametrize("idle", [True, False])
async def test_an_emptied_redis_is_filled_again(store: Store, idle: bool) -> None:
    replica, ingress = await started(store)
    await store.execute("FLUSHALL")
    if not idle:
        replica.compute(P[2])
    for _ in range(2):
        await replica.publish()
    replica.compute(P[3])
    await replica.publish()
    for reader in (ingress, Ingress(store, replica)):
        await reader.heal(replica)
        assert reader.agrees(*P)


async def test_a_restarted_redis_costs_nothing_but_a_snapshot(store: Store, valkey: Valkey) -> None:
    replica, ingress = await started(store)
    valkey.kill()
    replica.compute(P[2])
    with pytest.raises(StoreError):
        await replica.publish()
    replica.compute(P[3])
    valkey.start()
    await asyncio.sleep(0.15)  # the breaker
    for _ in range(3):
        await replica.publish()
    for reader in (ingress, Ingress(store, replica)):
        await reader.heal(replica)
        assert reader.agrees(*P)


@pytest.mark.parametrize(
    "spoil",
    [
        ("SET", "{stream}", "a string"),
        ("XADD", "{stream}", "99999999999999999-1", "b", "an entry too many"),
        ("XADD", "{stream}", "1-99", "other", "field"),
        ("SET", "{snapshot}", "no snapshot"),
        ("LPUSH", "{snapshot}", "no snapshot"),
        ("LPUSH", "{wanted}", "no wish"),
    ],
)
async def test_garbage_under_any_key_is_noticed_and_replaced(store: Store, spoil: Sequence[str]) -> None:
    replica, ingress = await started(store)
    keys = {"stream": replica.keys.stream, "snapshot": replica.keys.snapshot, "wanted": replica.keys.wanted}
    if spoil[0] in ("SET", "LPUSH"):
        await store.execute("DEL", spoil[1].format(**keys))
    await store.execute(*(word.format(**keys) for word in spoil))
    await ingress.read()
    replica.compute(P[2])
    fresh = Ingress(store, replica)
    await fresh.heal(replica)
    await ingress.heal(replica)
    for _ in range(3):
        await replica.publish()
        await ingress.read()
        await fresh.read()
        ingress.clock.now += 0.3
        fresh.clock.now += 0.3
    for reader in (ingress, fresh):
        await reader.heal(replica)
        assert reader.agrees(*P)


async def test_a_stream_that_was_put_in_the_place_of_another_is_not_believed(store: Store, other: Store) -> None:
    replica, ingress = await started(store)
    stranger = Replica(other, "a", epoch=2)
    stranger.compute(P[5])
    await stranger.publish()
    for part in ("stream", "snapshot"):
        theirs, ours = getattr(stranger.keys, part), getattr(replica.keys, part)
        assert theirs != ours
        await store.execute("DEL", ours)
        await store.execute("RESTORE", ours, 0, await store.execute("DUMP", theirs))
    await ingress.read()
    assert ingress.index.guessed == {"a"}
    assert ingress.registry.num_lost == {"epoch": 1}
    assert ingress.index.match(hashes(P[5])) == {}
    await ingress.heal(replica)
    assert ingress.agrees(*P)


async def test_two_clusters_on_one_redis_do_not_meet(store: Store, other: Store) -> None:
    pairs = []
    for i, cluster in enumerate((store, other)):
        replica = Replica(cluster, "a")
        replica.compute(P[i])
        await replica.publish()
        pairs.append((replica, Ingress(cluster, replica)))
    for replica, ingress in pairs:
        await ingress.heal()
        replica.compute(P[4])
        await replica.publish()
        await ingress.read()
        assert ingress.agrees(*P)
        assert not ingress.registry.num_lost


async def test_a_replica_that_starts_anew_is_cold_even_when_its_clock_went_back(store: Store) -> None:
    replica, ingress = await started(store)
    for epoch in (2, 1_000, 5):  # the last one by a clock that is behind
        replica = Replica(store, "a", epoch=epoch)
        replica.compute(P[3])
        ingress.connect(replica)
        await ingress.read()
        assert ingress.index.match(hashes(P[0])) == {}
        await ingress.heal(replica)
        assert ingress.agrees(*P)
        replica.compute(P[4])
        await replica.publish()
        await ingress.read()
        assert ingress.agrees(*P)


async def test_late_words_of_a_start_that_is_over_count_for_nothing(store: Store) -> None:
    old, ingress = await started(store)
    new = Replica(store, "a", epoch=2)
    new.compute(P[5])
    ingress.connect(new)
    await ingress.heal(new)
    old.compute(P[6])
    for _ in range(2):
        await old.publish()  # it takes the stream over, as it lives; whoever is connected to the new one notices
        await ingress.read()
        assert "a" not in ingress.index.match(hashes(P[6]))
    await ingress.heal(new)
    assert ingress.agrees(*P)


async def test_a_connection_made_anew_starts_from_the_snapshot_again(store: Store) -> None:
    _, ingress = await started(store)
    ingress.index.drop("a")
    ingress.index.add("a", 200)
    await ingress.heal()
    assert ingress.registry.num_lost == {"reconnected": 1}
    assert ingress.agrees(*P)


async def test_a_replica_whose_stream_stops_is_doubted_in_time(store: Store) -> None:
    replica, ingress = await started(store)
    ingress.clock.now += 1000
    await ingress.read()
    assert ingress.index.is_exact("a"), "nothing happened there: its word is as good as ever"
    replica.forget()  # and publishes nothing
    for _ in range(20):
        await ingress.read()
        ingress.clock.now += 0.05
    assert ingress.index.is_exact("a")
    for _ in range(4):
        await ingress.read()
        ingress.clock.now += 0.05
    assert ingress.index.guessed == {"a"}
    assert ingress.registry.num_lost == {"late": 1}
    await ingress.read()
    assert ingress.index.guessed == {"a"}, "the snapshot there is as old"
    await ingress.heal(replica)
    assert ingress.agrees(*P)


class Forgetful(Store):
    """Runs commands, then now and then claims that it could not: what a timeout looks like."""

    num_lies = 0

    async def pipeline(self, commands: Sequence[Command], *, alone: bool = False) -> list[Reply]:
        replies = await super().pipeline(commands, alone=alone)
        if self.num_lies:
            self.num_lies -= 1
            raise StoreUnavailableError("no answer")
        return replies


async def test_an_answer_that_got_lost_costs_neither_a_gap_nor_a_snapshot(valkey: Valkey) -> None:
    store = Forgetful(valkey.url, "test")
    replica, ingress = await started(store)
    before = replica.publisher.num_resets
    for tokens in P[2:]:
        replica.compute(tokens)
        store.num_lies = 2
        for _ in range(2):
            with pytest.raises(StoreUnavailableError):
                await replica.publish()
        replica.compute(P[0])
        await replica.publish()
        await ingress.read()
        assert ingress.agrees(*P)
    assert replica.publisher.num_resets == before
    assert not ingress.registry.num_lost
    await store.close()


async def test_a_redis_without_memory_left_delays_the_word_and_recovers(store: Store) -> None:
    replica, ingress = await started(store)
    await store.execute("CONFIG", "SET", "maxmemory", "1")
    replica.compute(P[2])
    for _ in range(3):
        await replica.publish()
        await ingress.read()
    assert ingress.index.match(hashes(P[2])) == {}
    await store.execute("CONFIG", "SET", "maxmemory", "0")
    await replica.publish()
    await ingress.heal(replica)
    assert ingress.agrees(*P)


async def test_a_great_change_is_told_by_a_snapshot(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicas.kv_publisher.MIN_SNAPSHOT_CHANGES", 2)
    replica, ingress = await started(store)
    before = replica.publisher.num_resets
    replica.forget()
    replica.compute(*P[2:9])
    await replica.publish()
    assert replica.publisher.num_resets == before + 1
    await ingress.read()
    await ingress.heal(replica)
    assert ingress.agrees(*P)
    assert ingress.registry.num_lost == {"resync": 1}


async def test_snapshots_keep_up_with_the_stream_and_the_stream_stays_short(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicas.kv_publisher.MIN_SNAPSHOT_CHANGES", 20)
    replica, ingress = await started(store)
    for i in range(200):
        replica.compute(prompt(i % 30))
        await replica.publish()
        await ingress.read()
    assert replica.publisher.num_snapshots > 5
    assert await store.execute("XLEN", replica.keys.stream) < 100
    fresh = Ingress(store, replica)
    await fresh.read()
    for reader in (ingress, fresh):
        assert reader.agrees(*(prompt(i) for i in range(30)))
    assert not ingress.registry.num_lost


async def test_a_closed_publisher_leaves_nothing_in_redis(store: Store) -> None:
    replica = Replica(store, "a")
    replica.publisher.start()
    await until(lambda: replica.publisher.age_s is not None, 10.0)
    assert await store.execute("KEYS", "*")
    await replica.publisher.close()
    await replica.publisher.close()
    assert await store.execute("KEYS", "*") == []


async def test_what_was_sent_is_expected_for_two_seconds_and_confirmed_by_the_replica(store: Store) -> None:
    replica, ingress = await started(store)
    ingress.index.sent("a", hashes(P[4]), now=ingress.clock())
    ingress.index.sent("a", hashes(P[5]), now=ingress.clock())
    assert ingress.index.match(hashes(P[4])) == {"a": 10}
    replica.compute(P[4])
    await replica.publish()
    ingress.clock.now += EXPECT_S
    await ingress.read()
    assert ingress.index.match(hashes(P[4])) == {"a": 10}
    assert ingress.index.match(hashes(P[5])) == {}


async def test_a_frozen_redis_leaves_no_certain_word_older_than_two_seconds(valkey: Valkey, store: Store) -> None:
    replica = Replica(store, "a", beat_s=0.1)
    replica.compute(P[0])
    ingress = Ingress(store, replica, clock=time.monotonic)
    replica.publisher.start()
    ingress.registry.start()
    await until(lambda: ingress.agrees(P[0]) and not ingress.index.guessed, 10.0)
    valkey.signal(signal.SIGSTOP)
    try:
        replica.forget()
        wrong_s = await until(lambda: "a" in ingress.index.guessed, 10.0)
        assert wrong_s < 2.0
        replica.compute(P[3])
        await asyncio.sleep(0.3)
    finally:
        valkey.signal(signal.SIGCONT)
    await until(lambda: not ingress.index.guessed and ingress.agrees(*P), 10.0)
    await replica.publisher.close()
    await ingress.registry.close()
