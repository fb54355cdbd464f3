"""The scripted gateway behind a real uvicorn on a free loopback port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn

from tests.gateway.scripted import Served


@asynccontextmanager
async def listening(served: Served) -> AsyncIterator[int]:
    """Yields the port; stops the server afterwards."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        config = uvicorn.Config(served.app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[sock]))
        while not server.started:  # noqa: ASYNC110 — uvicorn has a flag, not an event
            await asyncio.sleep(0.005)
        try:
            yield sock.getsockname()[1]
        finally:
            server.should_exit = True
            await task
