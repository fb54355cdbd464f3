"""The store against a real Valkey: up, gone, restarted, frozen, full of garbage."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

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
    store = Store(valkey.url, "test", StoreOptions(timeout_s=0.1, max_failures=2, open_s=0.3))
    await store.execute("SET", "k", "mine")
    valkey.signal(signal.SIGSTOP)
    try:
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(StoreUnavailableError):
                await store.execute("GET", "k")
            assert time.monotonic() - began < 0.4
        began = time.monotonic()
        for _ in range(100):
            with pytest.raises(BreakerOpenError):
                await store.execute("GET", "k")
        assert time.monotonic() - began < 0.1
    finally:
        valkey.signal(signal.SIGCONT)
    await asyncio.sleep(0.35)
    # Late replies to the calls that timed out must not be taken for replies to these.
    assert [await store.execute("INCRBY", "n", 1) for _ in range(3)] == [1, 2, 3]
    assert await store.execute("GET", "k") == b"mine"
    await store.close()


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
        assert time.monotonic() - began < 0.6
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
