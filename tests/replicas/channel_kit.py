"""Served scripted engines, in this process and in a child, for the tests of the channel."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from replicas.channel import (
    ChannelServer,
    LinkOptions,
    ReplicaLink,
    ServerOptions,
    UsageRecord,
)
from replicas.contract import StepDelta
from tests.replicas.scripted import SECRET, ScriptedEngine, counting, request, until


class Pair:
    """A server on its endpoint, its engine, and links to it."""

    def __init__(self, engine: ScriptedEngine, server: ChannelServer) -> None:
        self.engine = engine
        self.server = server
        self.links: list[ReplicaLink] = []

    async def link(self, ingress_id: str = "ingress-1", options: LinkOptions | None = None) -> ReplicaLink:
        link = await ReplicaLink.connect(self.server.endpoints[0], SECRET, ingress_id, options)
        self.links.append(link)
        return link


@asynccontextmanager
async def serving(endpoint: str, options: ServerOptions | None = None) -> AsyncIterator[Pair]:
    engine = ScriptedEngine()
    server = ChannelServer(engine, "replica-1", SECRET, options)
    await server.start([endpoint])
    pair = Pair(engine, server)
    try:
        yield pair
    finally:
        for link in pair.links:
            await link.close()
        await server.close()


async def read(stream: AsyncIterator[StepDelta]) -> list[StepDelta]:
    return [delta async for delta in stream]


class Replica:
    """A served scripted engine that keeps its journal in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.engine = ScriptedEngine()
        self.records: list[UsageRecord] = []
        options = ServerOptions(
            heartbeat_s=0.1, dead_after_s=0.8, handshake_s=10.0, max_handshakes=4, journal=self.records.extend
        )
        self.server = ChannelServer(self.engine, "replica-1", SECRET, options)

    @property
    def endpoint(self) -> str:
        return f"unix://{self.path}"

    def hurry(self) -> None:
        """Handshakes have little time from now on."""
        self.server.options = dataclasses.replace(self.server.options, handshake_s=0.3)

    async def raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection without any manners, as a stranger would make it."""
        return await asyncio.open_unix_connection(self.path)

    async def still_serves(self) -> None:
        link = await ReplicaLink.connect(self.endpoint, SECRET, "honest")
        stream = link.open(request("honest"))
        await until(lambda: any("honest" in i for i in self.engine.open))
        self.engine.step(counting(1))
        assert [d.finish_reason async for d in stream] == ["length"]
        await link.close()


CHILD = """
import asyncio, sys
from replicas.channel import ChannelServer, ServerOptions
from tests.replicas.scripted import SECRET, ScriptedEngine
async def main():
    server = ChannelServer(ScriptedEngine(), "child", SECRET, ServerOptions(heartbeat_s=0.1))
    await server.start([sys.argv[1]])
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def run_replica(folder: Path) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(  # noqa: ASYNC220 a real process, to be stopped and killed
        [sys.executable, "-c", CHILD, f"unix://{folder}/child.sock"],
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout is not None
    with process.stdout as stdout:
        assert await asyncio.to_thread(stdout.readline) == b"ready\n"
    return process
