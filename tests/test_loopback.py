"""The guard of tests/conftest.py bites, and only where it should."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import httpx
import pytest

from tests.conftest import is_loopback

ELSEWHERE = "192.0.2.1"  # reserved for documentation: nobody answers there
REFUSED = rf"loopback and Unix sockets only, this one tried \('{ELSEWHERE}', 80\)"


@pytest.mark.parametrize("name", ["connect", "connect_ex"])
def test_a_connection_to_elsewhere_fails_the_test(name: str) -> None:
    with socket.socket() as sock, pytest.raises(pytest.fail.Exception, match=REFUSED):
        sock.settimeout(0.1)
        getattr(sock, name)((ELSEWHERE, 80))


def test_code_that_copes_with_a_broken_network_does_not_hide_it() -> None:
    with pytest.raises(pytest.fail.Exception, match=REFUSED):
        try:
            httpx.get(f"http://{ELSEWHERE}/", timeout=0.1, trust_env=False)
        except Exception:
            pytest.fail("hidden")


async def test_the_event_loops_connections_are_guarded_too() -> None:
    with pytest.raises(pytest.fail.Exception, match=REFUSED):
        await asyncio.wait_for(asyncio.open_connection(ELSEWHERE, 80), 0.1)


def test_loopback_and_unix_sockets_are_free(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=1).close()
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(FileNotFoundError):
        sock.connect(str(tmp_path / "nobody.sock"))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("localhost.example", False),
    ],
)
def test_loopback_is_told_from_the_rest(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected
