"""The store against a real Valkey: up, gone, restarted, frozen, full of garbage."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

from routing.store import (
    BadValueError,
    Breaker,
    BreakerOpenError,
    Keys,
    Store,
    StoreOptions,
    StoreReplyError,
    StoreUnavailableError,
)
from tests.routing.conftest import Valkey


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[Store]:
    store = Store(valkey.url, "test")
    yield store
    await store.close()


def test_keys_carry_the_cluster_as_a_hash_tag() -> None:
    keys = Keys("blue")
    assert keys("members") == "wg:{blue}:members"
    assert keys("member", "r-1") == "wg:{blue}:member:r-1"


async def test_commands_run_and_a_pipeline_keeps_their_order(store: Store) -> None:
    assert await store.execute("SET", "k", b"\x00\xff") in (b"OK", True)
    assert await store.execute("GET", "k") == b"\x00\xff"
    assert await store.execute("GET", "absent") is None
    replies = await store.pipeline([("INCRBY", "n", 2), ("INCRBY", "n", 3), ("SADD", "s", "a", "b"), ("SMEMBERS", "s")])
    assert replies[:3] == [2, 5, 2]
    assert set(replies[3]) == {b"a", b"b"}


async def test_a_refused_command_is_an_error_of_that_command_alone(store: Store) -> None:
    await store.execute("SET", "text", "x")
    replies = await store.pipeline([("SADD", "text", "a"), ("GET", "text"), ("NOSUCHCOMMAND",)])
    assert isinstance(replies[0], StoreReplyError)
    assert "WRONGTYPE" in str(replies[0])
    assert replies[1] == b"x"
    assert isinstance(replies[2], StoreReplyError)
    with pytest.raises(StoreReplyError, match="WRONGTYPE"):
        await store.execute("SMEMBERS", "text")
    assert store.breaker.state == "closed"
    assert store.num_failures == 0


async def test_nobody_listening_is_unavailable_and_opens_the_breaker(tmp_path: Path) -> None:
    clock = Clock()
    store = Store(f"unix://{tmp_path}/nobody.sock", "test", StoreOptions(max_failures=3, open_s=1.0, clock=clock))
    for _ in range(3):
        with pytest.raises(StoreUnavailableError) as caught:
            await store.execute("PING")
        assert not isinstance(caught.value, BreakerOpenError)
    for _ in range(10):
        with pytest.raises(BreakerOpenError):
            await store.execute("PING")
    assert store.num_failures == 3
    clock.now += 1.0
    with pytest.raises(StoreUnavailableError):
        await store.execute("PING")
    assert store.num_failures == 4, "one probe"
    with pytest.raises(BreakerOpenError):
        await store.execute("PING")
    await store.close()


async def test_a_server_that_comes_back_is_used_again_after_one_probe(valkey: Valkey) -> None:
    store = Store(valkey.url, "test", StoreOptions(max_failures=2, open_s=0.1))
    await store.execute("SET", "k", "1")
    valkey.kill()
    for _ in range(2):
        with pytest.raises(StoreUnavailableError):
            await store.execute("PING")
    assert store.breaker.state == "open"
    valkey.start()
    await asyncio.sleep(0.12)
    assert await store.execute("GET", "k") is None
    assert store.breaker.state == "closed"
    await store.close()


async def test_a_restart_between_two_calls_costs_no_failure(valkey: Valkey, store: Store) -> None:
    await store.execute("PING")
    valkey.kill()
    valkey.start()
    assert await store.execute("INCRBY", "n", 1) == 1
    assert store.num_failures == 0


async def test_a_frozen_server_costs_its_timeout_a_few_times_and_then_nothing(valkey: Valkey) -> None:
    now = 0.0
    store = Store(valkey.url, "test", StoreOptions(timeout_s=0.1, max_failures=2, open_s=1.0, clock=lambda: now))
    await store.execute("SET", "k", "mine")
    valkey.signal(signal.SIGSTOP)
    try:
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(StoreUnavailableError):
                await store.execute("GET", "k")
            assert time.monotonic() - began < 2.0
        asked = store.num_round_trips
        for _ in range(100):
            with pytest.raises(BreakerOpenError):
                await store.execute("GET", "k")
        assert store.num_round_trips == asked, "each would cost 0.1"
    finally:
        valkey.signal(signal.SIGCONT)
    now = 1.05
    store.options = dataclasses.replace(store.options, timeout_s=2.0)  # who was frozen may take a moment
    # Late replies to the calls that timed out must not be taken for replies to these.
    assert [await store.execute("INCRBY", "n", 1) for _ in range(3)] == [1, 2, 3]
    assert await store.execute("GET", "k") == b"mine"
    await store.close()


async def _asks_and_stalls(url: str) -> bytes:
    """Asks, and holds the event loop up for longer than an answer may take, twice."""
    store = Store(url, "test", StoreOptions(timeout_s=0.5, max_failures=1))
    await store.execute("SET", "k", "mine")
    for _ in range(2):
        asked = asyncio.create_task(store.execute("GET", "k"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # the store's own task has sent it
        time.sleep(0.8)  # noqa: ASYNC251 just that is meant
        found: bytes = await asked
    assert store.num_failures == 0
    await store.close()
    return found


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_stall_of_this_process_is_none_of_redis(
    valkey: Valkey, run: Callable[[Coroutine[Any, Any, bytes]], bytes]
) -> None:
    assert run(_asks_and_stalls(valkey.url)) == b"mine"


async def test_a_server_that_answers_byte_by_byte_is_cut_off_in_time(tmp_path: Path) -> None:
    path = str(tmp_path / "drip.sock")
    stop = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                while not stop.wait(0.03):
                    try:
                        connection.send(b"+")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        store = Store(f"unix://{path}", "test", StoreOptions(timeout_s=0.2))
        began = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            await store.execute("GET", "k")
        assert time.monotonic() - began < 3.0
        stop.set()
        thread.join()
        await store.close()


async def test_a_bad_value_is_counted_and_logged_once_until_it_is_good_again(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = msgspec.json.Decoder(int)
    with caplog.at_level(logging.WARNING):
        for raw in (b"{", b"\xff\xfe", b'"text"', b""):
            with pytest.raises(BadValueError, match="bad value at k"):
                store.decode("k", raw, decoder)
        assert store.num_bad_values == 4
        assert len(caplog.records) == 1
        assert store.decode("k", b"5", decoder) == 5
        with pytest.raises(BadValueError):
            store.decode("k", b"nonsense", decoder)
        assert len(caplog.records) == 2


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="scheme"):
        Store("http://localhost", "test")


def test_only_one_call_probes_a_half_open_breaker() -> None:
    clock = Clock()
    breaker = Breaker(StoreOptions(max_failures=1, open_s=1.0, clock=clock))
    with pytest.raises(StoreUnavailableError), breaker.call():
        raise StoreUnavailableError("down")
    clock.now += 2
    with breaker.call():
        assert breaker.state == "half_open"
        with pytest.raises(BreakerOpenError), breaker.call():
            pass
    assert breaker.state == "closed"


def test_a_cancelled_probe_lets_the_next_one_try() -> None:
    clock = Clock()
    breaker = Breaker(StoreOptions(max_failures=1, open_s=1.0, clock=clock))
    with pytest.raises(StoreUnavailableError), breaker.call():
        raise StoreUnavailableError("down")
    clock.now += 2
    with pytest.raises(asyncio.CancelledError), breaker.call():
        raise asyncio.CancelledError
    with breaker.call():
        pass
    assert breaker.state == "closed"


def test_failures_count_in_a_row_only() -> None:
    breaker = Breaker(StoreOptions(max_failures=2))
    for _ in range(5):
        with pytest.raises(StoreUnavailableError), breaker.call():
            raise StoreUnavailableError("once")
        with breaker.call():
            pass
    assert breaker.state == "closed"


async def test_what_is_asked_in_one_turn_takes_one_round_trip_and_each_gets_its_own(store: Store) -> None:
    key = store.keys("k")
    asked = (
        store.execute("SET", key, "v"),
        store.pipeline([("GET", key), ("NO-SUCH-COMMAND",)]),
        store.execute("LPUSH", key, "x"),
        store.pipeline([]),
        store.execute("GET", key),
    )
    said, (got, refused), pushed, nothing, again = await asyncio.gather(*asked, return_exceptions=True)
    assert (said, got, nothing, again) == (True, b"v", [], b"v")
    assert isinstance(refused, StoreReplyError) and isinstance(pushed, StoreReplyError), "theirs alone"
    assert store.num_round_trips == 1
    await store.execute("GET", key)
    assert store.num_round_trips == 2


async def test_who_does_not_wait_any_more_takes_nobody_s_reply_along(store: Store) -> None:
    key = store.keys("k")
    first, second = (asyncio.create_task(store.execute("INCR", key)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == 2, "both were sent, in the order they were given in"
    assert first.cancelled()


async def under_way(store: Store) -> None:
    while not store.num_round_trips:  # noqa: ASYNC110 a turn or two
        await asyncio.sleep(0)


async def test_what_comes_while_an_answer_is_under_way_goes_out_together_after_it(store: Store) -> None:
    key = store.keys("k")
    first = asyncio.create_task(store.execute("SET", key, 0))
    await under_way(store)
    found = await asyncio.gather(*(store.execute("INCR", key) for _ in range(20)))
    assert found == list(range(1, 21)) and first.done()
    assert store.num_round_trips == 2


async def test_all_of_a_batch_hear_that_redis_is_gone_which_counts_once(store: Store, valkey: Valkey) -> None:
    await store.execute("PING")
    valkey.kill()
    for _ in range(2):
        found = await asyncio.gather(*(store.execute("PING") for _ in range(5)), return_exceptions=True)
        assert all(isinstance(error, StoreUnavailableError) for error in found)
    assert store.breaker.state == "closed" and store.num_failures == 2


async def test_pollers_of_one_store_wake_together(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now, sleep = asyncio.get_running_loop().time, asyncio.sleep
    planned: list[float] = []

    async def noted(seconds: float) -> None:
        planned.append(now() + seconds)
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", noted)
    for period_s in (0.1, 0.1, 0.2):
        await sleep(0.013)
        await store.beat(period_s)
        assert now() > planned[-1] - 0.002
    first, second, third = (moment / 0.1 for moment in planned)
    assert second - first == pytest.approx(round(second - first), abs=0.1), "multiples of a period, whoever it was"
    assert third - second == pytest.approx(round(third - second), abs=0.1)


async def test_closing_waits_for_what_is_under_way(store: Store, valkey: Valkey) -> None:
    said = asyncio.create_task(store.execute("SET", store.keys("last"), "word"))
    await asyncio.sleep(0)
    await store.close()
    assert await said
    assert b"word" in valkey.raw("GET", store.keys("last"))


async def test_what_speaks_no_redis_fails_all_who_wait_and_nobody_after_them(tmp_path: Path) -> None:
    lies = [b"$garbage\r\n"]

    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while asked := await reader.read(1000):
                await asyncio.sleep(0.05)
                writer.write(lies.pop() if lies and b"PING" in asked else b"+OK\r\n" * asked.count(b"*"))

    server = await asyncio.start_unix_server(lie, tmp_path / "s")
    store = Store(f"unix://{tmp_path}/s", "test")
    try:
        first = asyncio.create_task(store.pipeline([("PING",)]))
        await under_way(store)
        meanwhile = [asyncio.create_task(store.execute("PING")) for _ in range(2)]
        with pytest.raises(StoreUnavailableError):
            await first
        async with asyncio.timeout(2.0):
            assert len(await asyncio.gather(*meanwhile)) == 2
            await asyncio.gather(store.execute("PING"), store.execute("PING"))
        assert store.num_failures == 1
    finally:
        await store.close()
        server.close()
        await asyncio.sleep(0.05)  # its connections end


async def test_a_command_that_cannot_be_sent_hurts_nobody_else(store: Store) -> None:
    key = store.keys("k")
    asked = (store.execute("SET", key, None), store.execute("GET", "\ud800"), store.execute("SET", key, "v"))  # type: ignore[arg-type]
    wrong, surrogate, right = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(wrong, TypeError) and isinstance(surrogate, UnicodeEncodeError)
    assert right and store.num_failures == 0


async def test_who_waits_when_the_loop_ends_hears_of_it(store: Store) -> None:
    await store.execute("PING")  # connected
    first = asyncio.create_task(store.execute("PING"))
    while store.num_round_trips < 2:  # noqa: ASYNC110 a turn or two
        await asyncio.sleep(0)
    second = asyncio.create_task(store.execute("PING"))
    await asyncio.sleep(0)
    (sending,) = [task for task in asyncio.all_tasks() if task.get_name() == "ask Redis"]
    sending.cancel()
    for waiting in (first, second):
        with pytest.raises(StoreUnavailableError):
            await waiting
    assert await store.execute("PING"), "and later ones are asked"


@pytest.mark.parametrize("phase", [0.0, 0.0002, 0.0006, 0.0008])
def test_a_beat_is_one_beat_on_uvloop_too(tmp_path: Path, phase: float) -> None:
    """Its clock has whole milliseconds and its timers round to them."""
    store = Store(f"unix://{tmp_path}/s", "test")
    store._phase = phase

    async def beats() -> int:
        loop, number = asyncio.get_running_loop(), 0
        end = loop.time() + 0.52
        while loop.time() < end:
            await store.beat(0.05)
            number += 1
        return number

    assert uvloop.run(beats()) <= 12
