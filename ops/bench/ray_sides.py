"""The sides of `bench gateway` that need Ray: our own stack behind HAProxy, and a stream over a DeploymentHandle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import psutil
import yaml

from configs.schema import Config
from ops.bench.harness import BenchError, Sample

START_S = 120.0
SETTLE_S = 6.0
"""HAProxy is reloaded, and so a new process, for a while after replicas came."""


@contextlib.asynccontextmanager
async def served(config: Config) -> AsyncIterator[tuple[int, dict[str, list[int]]]]:
    """`warmgate serve` of a profile with one group: its port, and pids by role."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="wgb-") as folder:
        profile = Path(folder) / "bench.yaml"
        profile.write_text(yaml.safe_dump(msgspec.to_builtins(config)))
        log = Path(folder) / "serve.log"
        command = (sys.executable, "-m", "ops.cli", "serve", str(profile), "--port", str(port))
        cluster = ("--set", f"cluster=bench{os.getpid()}")
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(*command, *cluster, stdout=output, stderr=output)
        try:
            await _ready(port, process, log)
            await asyncio.sleep(SETTLE_S)
            yield port, _roles(process.pid, config.groups[0].name)
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGINT)
                await asyncio.wait_for(process.wait(), 60)


async def _ready(port: int, process: asyncio.subprocess.Process, log: Path) -> None:
    async with httpx.AsyncClient() as client, asyncio.timeout(START_S):
        while process.returncode is None:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"http://127.0.0.1:{port}/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.3)
    said = await asyncio.to_thread(log.read_text)
    raise BenchError(f"warmgate serve ended: {said[-500:]}")


def _roles(root: int, group: str) -> dict[str, list[int]]:
    """Pids under a supervisor by what they do."""
    roles: dict[str, list[int]] = {"haproxy": [], "ingress": [], "replicas": []}
    for process in psutil.Process(root).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and ("#ingress#" in title or ":ingress" in title):
                roles["ingress"].append(process.pid)
            elif title.startswith("ray::") and f"group-{group}" in title:
                roles["replicas"].append(process.pid)
            elif process.name() == "haproxy":
                roles["haproxy"].append(process.pid)
    if not all(roles.values()):
        raise BenchError(f"not every role of the stack was found: {roles}")
    return roles


@dataclass(slots=True)
class RayHandle:
    """`concurrency` streams over a DeploymentHandle: chunks a CPU-second of both its ends. A `harness.Side`."""

    concurrency: int
    metric: str
    name: str = "ray handle"
    _process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        command = (sys.executable, "-m", "ops.bench.rivals.ray_handle", str(self.concurrency))
        pipe = asyncio.subprocess.PIPE
        quiet = asyncio.subprocess.DEVNULL
        self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=quiet)
        await self._hear()

    async def sample(self) -> Sample:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        return {self.metric: await self._hear()}

    async def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            await asyncio.wait_for(self._process.wait(), 60)

    async def _hear(self) -> float:
        assert self._process is not None and self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), START_S)
        if not line:
            raise BenchError("the Ray handle rival ended: python -m ops.bench.rivals.ray_handle 4 shows why")
        return float(line)
