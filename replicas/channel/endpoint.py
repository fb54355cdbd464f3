"""Where a channel listens: `unix:///path` on one node (the default), `tcp://host:port` between nodes."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from replicas.channel.errors import EndpointError

MAX_UNIX_PATH_BYTES = 107
"""`sockaddr_un.sun_path` is 108 bytes on Linux, the closing NUL included."""

ProtocolFactory: TypeAlias = Callable[[], asyncio.Protocol]


@dataclass(frozen=True, slots=True)
class UnixEndpoint:
    path: str

    def __str__(self) -> str:
        return f"unix://{self.path}"

    async def connect(self, factory: ProtocolFactory) -> None:
        await asyncio.get_running_loop().create_unix_connection(factory, self.path)

    async def listen(self, factory: ProtocolFactory) -> tuple[asyncio.Server, UnixEndpoint]:
        server = await asyncio.get_running_loop().create_unix_server(factory, sock=_bind_unix(self.path))
        return server, self

    def clean(self) -> None:
        """Removes the socket file, unless someone else's server answers there by now."""
        if not _is_answering(self.path):
            Path(self.path).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class TcpEndpoint:
    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"

    async def connect(self, factory: ProtocolFactory) -> None:
        await asyncio.get_running_loop().create_connection(factory, self.host, self.port)

    async def listen(self, factory: ProtocolFactory) -> tuple[asyncio.Server, TcpEndpoint]:
        """Port 0 picks a free one; the endpoint returned names it."""
        try:
            server = await asyncio.get_running_loop().create_server(factory, self.host, self.port)
        except OSError as error:
            raise EndpointError(f"cannot listen on {self}: {error.strerror or error}") from error
        return server, TcpEndpoint(self.host, server.sockets[0].getsockname()[1])

    def clean(self) -> None:
        """Nothing outlives a closed TCP listener."""


Endpoint: TypeAlias = UnixEndpoint | TcpEndpoint


def parse_endpoint(text: str) -> Endpoint:
    """Reads `unix:///path` or `tcp://host:port`; raises EndpointError saying what is wrong."""
    scheme, separator, rest = text.partition("://")
    if scheme == "unix" and separator and rest.startswith("/"):
        num_bytes = len(os.fsencode(rest))
        if num_bytes > MAX_UNIX_PATH_BYTES:
            raise EndpointError(
                f"the socket path {rest} has {num_bytes} bytes, the system allows {MAX_UNIX_PATH_BYTES}: "
                "choose a shorter run folder"
            )
        return UnixEndpoint(rest)
    host, colon, port = rest.rpartition(":")
    if scheme == "tcp" and colon and host and port.isascii() and port.isdigit() and int(port) < 65536:
        return TcpEndpoint(host.removeprefix("[").removesuffix("]"), int(port))
    raise EndpointError(f"endpoint {text!r} is neither unix:///path nor tcp://host:port")


def _bind_unix(path: str) -> socket.socket:
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        # Nobody can connect before listen(), so there is no moment with wider permissions.
        os.chmod(path, 0o600)
    except OSError as error:
        sock.close()
        raise EndpointError(f"cannot listen on unix://{path}: {error.strerror}") from error
    return sock


def _remove_stale(path: str) -> None:
    """Removes the socket file a dead process left; raises EndpointError when it is alive or no socket at all."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise EndpointError(f"{path} exists and is not a socket")
    if _is_answering(path):
        raise EndpointError(f"unix://{path} is in use by a running server")
    Path(path).unlink(missing_ok=True)


def _is_answering(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # a full backlog or a refused permission: someone is there
    return True


def set_no_delay(transport: asyncio.BaseTransport) -> None:
    """Turns Nagle's algorithm off on TCP: a step's frame must not wait for the next one's."""
    sock: Any = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
