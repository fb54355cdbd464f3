"""Ingresses keep counts together through a real Valkey, whatever becomes of it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from routing import shared_counts
from routing.shared_counts import MAX_KEYS, Key, SharedCounts, SharedCountsOptions
from routing.store import Store, StoreError, StoreOptions, StoreReplyError
from tests.routing.conftest import Valkey

P: Key = ("served", "m", "p")
Q: Key = ("served", "m", "q")


class Ingress:
    """One ingress's counts on a clock of its own, and what it heard."""

    def __init__(self, valkey: Valkey, name: str, now: float = 0.0, secret: bytes = b"secret") -> None:
        self.now = now
        self.heard: dict[Key, float] = {}
        self.own: dict[Key, float] = {}
        self.num_heard = 0
        options = StoreOptions(timeout_s=1.0, max_failures=1000)
        self.store = Store(valkey.url, "c", options)
        self.counts = SharedCounts(self.store, name, secret, SharedCountsOptions(clock=lambda: self.now))
        self.counts.on_added = self._on_added
        self.counts.gauges = lambda: self.own
        self.counts.on_heard = self._on_heard

    def _on_added(self, key: Key, amount: float) -> None:
        self.heard[key] = self.heard.get(key, 0.0) + amount

    def _on_heard(self) -> None:
        self.num_heard += 1


class Pair:
    """Two ingresses whose clocks have nothing in common."""

    def __init__(self, valkey: Valkey) -> None:
        self.valkey = valkey
        self.a = Ingress(valkey, "a")
        self.b = Ingress(valkey, "b", now=1e9)
        self.all = [self.a, self.b]

    def join(self, ingress: Ingress) -> Ingress:
        self.all.append(ingress)
        return ingress

    async def sync(self, seconds: float = 0.2) -> None:
        """Everybody tells, then everybody listens."""
        for _ in range(2):
            for ingress in self.all:
                ingress.now += seconds / 2
                with suppress(StoreError):
                    await ingress.counts.refresh()

    @property
    def key(self) -> str:
        return self.a.store.keys("counts")


@pytest.fixture
async def pair(valkey: Valkey) -> AsyncIterator[Pair]:
    made = Pair(valkey)
    try:
        await made.sync()
        yield made
    finally:
        for ingress in made.all:
            await ingress.counts.close()
            await ingress.store.close()


async def test_what_one_adds_the_other_hears_once(pair: Pair) -> None:
    pair.a.counts.add(P, 10.0)
    pair.a.counts.add(P, 5.0)
    pair.b.counts.add(Q, -2.5)
    for _ in range(3):
        await pair.sync()
    assert (pair.a.heard, pair.b.heard) == ({Q: -2.5}, {P: 15.0})
    pair.a.counts.add(P, 1.0)
    await pair.sync()
    assert pair.b.heard == {P: 16.0}


async def test_what_was_added_before_somebody_came_is_past_for_it(pair: Pair) -> None:
    pair.a.counts.add(P, 1000.0)
    await pair.sync()
    late = pair.join(Ingress(pair.valkey, "late"))
    await pair.sync()
    pair.a.counts.add(P, 7.0)
    await pair.sync()
    assert late.heard == {P: 7.0}


async def test_a_key_that_was_still_for_a_while_counts_from_nothing_again(pair: Pair) -> None:
    pair.a.counts.add(P, 10.0)
    await pair.sync()
    await pair.sync(seconds=10.0)
    pair.a.counts.add(P, 3.0)
    await pair.sync()
    assert pair.b.heard == {P: 13.0}


async def test_redis_frozen_emptied_and_restarted_loses_nothing(pair: Pair) -> None:
    pair.a.counts.add(P, 10.0)
    pair.valkey.signal(signal.SIGSTOP)
    pair.a.store.options = pair.b.store.options = StoreOptions(timeout_s=0.05, max_failures=1000)
    await pair.sync()
    pair.a.counts.add(P, 10.0)
    pair.valkey.signal(signal.SIGCONT)
    pair.a.store.options = pair.b.store.options = StoreOptions(timeout_s=1.0, max_failures=1000)
    await asyncio.sleep(0.1)
    await pair.sync()
    assert pair.b.heard == {P: 20.0}
    pair.a.counts.add(P, 1.0)
    pair.valkey.kill()
    await pair.sync()
    pair.valkey.start()
    await pair.sync()
    await pair.sync()
    assert pair.b.heard == {P: 21.0}
    pair.valkey.raw("FLUSHALL")
    pair.a.counts.add(P, 1.0)
    await pair.sync()
    assert pair.b.heard == {P: 22.0}


async def test_garbage_counts_for_nothing_and_is_swept_away(pair: Pair) -> None:
    pair.a.counts.add(P, 10.0)
    await pair.sync()
    genuine = pair.valkey.raw("HGET", pair.key, "a").split(b"\r\n", 1)[1][:-2]
    for name, value in (("x", b"\x00" * 100), ("\udcff", b""), ("y", genuine), ("z", b"z" * 5_000_000)):
        pair.valkey.raw("HSET", pair.key, name.encode(errors="surrogateescape"), value)
    stranger = pair.join(Ingress(pair.valkey, "stranger", secret=b"another"))
    stranger.counts.add(P, 1e12)
    await pair.sync()
    stranger.counts.add(P, 1e12)
    await pair.sync()
    assert pair.b.heard == {P: 10.0}
    assert pair.a.counts.num_others == 1
    pair.all.remove(stranger)
    await stranger.store.close()
    await pair.sync()
    assert pair.valkey.raw("HLEN", pair.key) == b":2\r\n"


async def test_an_old_record_put_back_counts_for_nothing(pair: Pair) -> None:
    pair.a.counts.add(P, 10.0)
    await pair.sync()
    old = pair.valkey.raw("HGET", pair.key, "a").split(b"\r\n", 1)[1][:-2]
    pair.a.counts.add(P, 5.0)
    await pair.sync()
    pair.valkey.raw("HSET", pair.key, "a", old)
    await pair.b.counts.refresh()
    await pair.sync()
    assert pair.b.heard == {P: 15.0}


async def test_a_value_of_another_type_in_its_place_is_replaced(pair: Pair) -> None:
    pair.valkey.raw("DEL", pair.key)
    pair.valkey.raw("SET", pair.key, "nonsense")
    pair.a.counts.add(P, 10.0)
    for _ in range(3):
        await pair.sync()
    assert pair.b.heard == {P: 10.0}


async def test_gauges_are_the_last_word_of_those_who_are_not_silent(pair: Pair) -> None:
    gauge: Key = ("open", "p")
    pair.a.own = {gauge: 3.0, P: float("nan")}
    await pair.sync()
    assert list(pair.b.counts.others(gauge)) == [3.0]
    assert list(pair.a.counts.others(gauge)) == [] == list(pair.b.counts.others(P))
    pair.a.own = {}
    await pair.sync()
    assert list(pair.b.counts.others(gauge)) == []
    pair.a.own = {gauge: 2.0}
    await pair.sync()
    pair.b.now += 1.5
    await pair.b.counts.refresh()
    assert list(pair.b.counts.others(gauge)) == [], "it has not spoken for long"


async def test_who_has_gone_is_forgotten_by_all_and_in_redis(pair: Pair) -> None:
    pair.b.now += 61.0
    await pair.b.counts.refresh()
    assert pair.b.counts.num_others == 0
    assert pair.valkey.raw("HEXISTS", pair.key, "a") == b":0\r\n"
    pair.a.counts.add(P, 1.0)
    await pair.sync()
    pair.a.counts.add(P, 2.0)
    await pair.sync()
    assert pair.b.heard == {P: 2.0}, "it comes back as one that is new"


async def test_who_closes_leaves_nothing_behind(pair: Pair) -> None:
    third = pair.join(Ingress(pair.valkey, "third"))
    third.counts.start()
    for _ in range(500):
        if pair.valkey.raw("HEXISTS", pair.key, "third") == b":1\r\n":
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail("it never told")
    await third.counts.close()
    assert pair.valkey.raw("HEXISTS", pair.key, "third") == b":0\r\n"


async def test_a_record_is_bounded_and_tells_the_latest(pair: Pair) -> None:
    for number in range(3 * MAX_KEYS):
        pair.a.counts.add(("served", "m", f"t{number}"), 1.0)
    pair.a.counts.add(P, 4.0)
    await pair.sync()
    assert len(pair.b.heard) == MAX_KEYS
    assert pair.b.heard[P] == 4.0
    await pair.sync(seconds=10.0)
    assert pair.b.counts.num_bytes < 1000, "nothing is told for ever"


async def test_what_was_added_while_redis_was_away_for_long_is_told_when_it_is_back(pair: Pair) -> None:
    pair.valkey.kill()
    pair.a.counts.add(P, 100.0)
    for _ in range(5):
        await pair.sync(seconds=6.0)
    pair.valkey.start()
    for _ in range(5):
        await pair.sync()
    assert pair.b.heard == {P: 100.0}


async def test_while_redis_is_away_the_stillest_keys_are_forgotten_first(pair: Pair) -> None:
    pair.valkey.kill()
    for number in range(2 * MAX_KEYS):
        pair.a.counts.add(("served", "m", f"t{number}"), 1.0)
        if number % 1000 == 0:
            pair.a.counts.add(P, 1.0)
    await pair.sync()
    assert len(pair.a.counts._tallies) == MAX_KEYS
    pair.valkey.start()
    await pair.sync()
    assert len(pair.b.heard) == MAX_KEYS
    assert pair.b.heard[P] == 17.0


async def test_a_key_that_was_cut_and_is_told_again_counts_once(pair: Pair) -> None:
    pair.a.counts.add(P, 1000.0)
    await pair.sync()
    for number in range(MAX_KEYS):
        pair.a.counts.add(("served", "m", f"t{number}"), 1.0)
    await pair.sync()
    pair.a.counts.add(P, 1.0)
    await pair.sync()
    assert pair.b.heard[P] == 1001.0


async def test_a_key_that_began_anew_between_two_readings_is_heard_whole(pair: Pair) -> None:
    pair.a.counts.add(P, 1000.0)
    await pair.sync()
    await pair.a.counts.refresh()
    pair.a.now += 10.0
    await pair.a.counts.refresh()
    pair.a.counts.add(P, 1500.0)
    await pair.sync()
    assert pair.b.heard == {P: 2500.0}


async def test_ingresses_that_speak_seldom_because_there_is_much_to_tell_are_not_silent(pair: Pair) -> None:
    """With so many bytes the period is longer than `fresh_s` and about as long as `told_s`."""
    gauge: Key = ("open", "p")
    pair.a.own = {gauge: 3.0}
    for number in range(MAX_KEYS):
        pair.a.counts.add(("served", "a model with quite a long name", f"{number:0250}"), 1.0)
    await pair.sync()
    period_s = pair.b.counts._period_s
    assert period_s > 1.5
    pair.a.counts.add(P, 5.0)
    for _ in range(3):
        await pair.a.counts.refresh()
        pair.a.now += period_s
        pair.b.now += period_s
        assert list(pair.b.counts.others(gauge)) == [3.0]
    await pair.b.counts.refresh()
    assert pair.b.heard[P] == 5.0
    pair.b.now += 10 * period_s
    assert list(pair.b.counts.others(gauge)) == []


async def test_failed_refreshes_are_heard_of_too(pair: Pair) -> None:
    gauge: Key = ("open", "p")
    pair.a.own = {gauge: 3.0}
    await pair.sync()
    pair.valkey.kill()
    pair.b.now += 5.0
    num_heard = pair.b.num_heard
    with pytest.raises(StoreError):
        await pair.b.counts.refresh()
    assert pair.b.num_heard == num_heard + 1
    assert list(pair.b.counts.all_others()) == []


async def test_old_records_of_one_that_is_gone_count_for_nothing(pair: Pair) -> None:
    records = []
    for _ in range(3):
        pair.a.counts.add(P, 50_000.0)
        await pair.sync()
        records.append(pair.valkey.raw("HGET", pair.key, "a").split(b"\r\n", 1)[1][:-2])
    pair.b.now += 61.0
    await pair.b.counts.refresh()
    assert pair.b.counts.num_others == 0
    for record in records:
        pair.valkey.raw("HSET", pair.key, "a", record)
        pair.b.now += 0.2
        await pair.b.counts.refresh()
        assert pair.b.counts.num_others == 0
    assert pair.b.heard == {P: 150_000.0}
    assert pair.valkey.raw("HEXISTS", pair.key, "a") == b":0\r\n"


async def test_only_so_many_numbers_of_those_who_are_gone_are_remembered(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_counts, "MAX_NUMBERS", 3)
    for number in range(5):
        one = Ingress(pair.valkey, f"restarted {number}")
        await one.counts.refresh()
        await pair.b.counts.refresh()
        await one.store.close()
    assert list(pair.b.counts._numbers) == [f"restarted {number}" for number in (2, 3, 4)]


@pytest.mark.parametrize(
    ("refuse", "allow"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        (("ACL", "SETUSER", "default", "-hset"), ("ACL", "SETUSER", "default", "+hset")),
    ],
)
async def test_a_refused_write_takes_nothing_from_the_others_and_they_are_still_heard(
    pair: Pair, refuse: tuple[str, ...], allow: tuple[str, ...]
) -> None:
    pair.b.counts.add(Q, 2.0)
    await pair.b.counts.refresh()
    pair.a.counts.add(P, 1.0)
    assert pair.valkey.raw(*refuse) == b"+OK\r\n"
    with pytest.raises(StoreReplyError):
        await pair.a.counts.refresh()
    assert pair.a.heard == {Q: 2.0}
    assert pair.valkey.raw("HLEN", pair.key) == b":2\r\n"
    pair.a.now += 30.0
    pair.valkey.raw(*allow)
    await pair.sync()
    assert pair.b.heard == {P: 1.0}


async def test_who_may_not_read_deletes_nothing(pair: Pair) -> None:
    pair.valkey.raw("ACL", "SETUSER", "default", "-hgetall")
    with pytest.raises(StoreReplyError):
        await pair.a.counts.refresh()
    assert pair.valkey.raw("HLEN", pair.key) == b":2\r\n"


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    history=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(("a", "b")), st.sampled_from((P, Q)), st.integers(-50, 100)),
            st.tuples(st.just("sync"), st.sampled_from((0.2, 3.0)), st.just(0)),
            st.tuples(st.sampled_from(("tell a", "tell b", "flush")), st.just(0.0), st.just(0)),
        ),
        max_size=25,
    )
)
async def test_everything_is_heard_once_whoever_speaks_when(
    valkey: Valkey, history: list[tuple[str, Key | float, int]]
) -> None:
    valkey.raw("FLUSHALL")
    pair = Pair(valkey)
    await pair.sync()
    told: dict[str, dict[Key, float]] = {"a": {}, "b": {}}
    ingresses = {"a": pair.a, "b": pair.b}
    for act, what, amount in history:
        if act == "sync":
            assert isinstance(what, float)
            await pair.sync(what)
        elif act == "flush":
            valkey.raw("FLUSHALL")
        elif act.startswith("tell"):
            await ingresses[act[-1]].counts.refresh()
        else:
            assert isinstance(what, tuple)
            ingresses[act].counts.add(what, float(amount))
            told[act][what] = told[act].get(what, 0.0) + amount
            await pair.sync(0.05)
    await pair.sync()
    for ingress in pair.all:
        await ingress.store.close()
    for speaker, listener in (("a", pair.b), ("b", pair.a)):
        heard = {key: amount for key, amount in listener.heard.items() if amount}
        assert heard == {key: amount for key, amount in told[speaker].items() if amount}
