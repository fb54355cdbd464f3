"""What is true of every test: it talks to this machine alone."""

from __future__ import annotations

import gc
import ipaddress
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings


def is_loopback(host: str) -> bool:
    """Whether `host`, a literal address or `localhost`, is this machine talking to itself."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def only_loopback(connect: Callable[[socket.socket, Any], Any]) -> Callable[[socket.socket, Any], Any]:
    """`connect`, which fails the test that opens a TCP connection to elsewhere; Unix sockets and UDP pass."""

    def guarded(self: socket.socket, address: Any) -> Any:
        is_tcp = self.family in (socket.AF_INET, socket.AF_INET6) and self.type == socket.SOCK_STREAM
        if is_tcp and not is_loopback(address[0]):
            self.close()  # those who made it expect nothing worse than OSError, and would leak it
            # Failed is no Exception: code that copes with a broken network does not hide it.
            pytest.fail(f"a test may connect to loopback and Unix sockets only, this one tried {address!r}")
        return connect(self, address)

    return guarded


settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # an example may take a second on a machine that stands still for as long

gc.disable()  # while all is imported: nothing of it goes away


def pytest_collection_finish() -> None:
    """What is loaded by now stays: some 600,000 objects, which a collection would walk for half a second, in the middle
    of a test whose replicas and ingresses are expected to answer."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_connection_leaves_this_machine() -> Iterator[None]:
    """For this process; what tests start keeps to loopback by its own configuration."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, only_loopback(getattr(socket.socket, name)))
        yield
