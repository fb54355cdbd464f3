"""Running one ASGI app under uvicorn on a free loopback port, inside an event loop that is already running."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import uvicorn

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
AsgiApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Served:
    """Where an app answers."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@dataclass(slots=True)
class Exchange:
    """One request and the way to answer it. `headers` go with every answer; `gone` is set when the client has left."""

    scope: Scope
    receive: Receive
    send: Send
    headers: tuple[tuple[bytes, bytes], ...] = ()
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def body(self) -> bytes:
        parts = []
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                self.gone.set()
                return b""
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)

    async def watch(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.gone.set()

    def header(self, name: bytes) -> str | None:
        return next((value.decode() for key, value in self.scope["headers"] if key == name), None)

    async def begin(self, status: int, content_type: bytes, *more: tuple[bytes, bytes]) -> None:
        headers = [(b"content-type", content_type), *self.headers, *more]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes, last: bool = False) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": not last})

    async def answer(self, status: int, body: bytes, *more: tuple[bytes, bytes]) -> None:
        await self.begin(status, b"application/json", (b"content-length", str(len(body)).encode()), *more)
        await self.write(body if self.scope["method"] != "HEAD" else b"", last=True)

    def cut(self) -> None:
        """Closes the connection as it stands. ASGI has no word for it: this reaches into uvicorn's request cycle."""
        cycle: Any = getattr(self.send, "__self__")  # noqa: B009
        cycle.transport.close()


class _GuestServer(uvicorn.Server):
    """uvicorn without signal handlers: the process it runs in has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listening_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 lets the kernel choose. Clients may connect before anything accepts."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.listen(2048)
    sock.setblocking(False)
    return sock


@contextlib.asynccontextmanager
async def serve_asgi(app: AsgiApp, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Served]:
    """Serves `app` until the block ends; open connections are then cut after a second."""
    sock = listening_socket(host, port)
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=600,
        timeout_graceful_shutdown=1,
        backlog=2048,
    )
    server = _GuestServer(config)
    task = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        while not server.started:
            if task.done():
                task.result()
                raise RuntimeError("uvicorn ended before it had started")
            await asyncio.sleep(0.005)
        yield Served(host, sock.getsockname()[1])
    finally:
        server.should_exit = True
        await task
        sock.close()
