"""The gateway without Ray: a Valkey, sim replicas and ingresses, a process each, so that each one's CPU can be told.

`python -m ops.bench.stack replica|ingress FOLDER NAME` is one of its processes; FOLDER holds the profile and runtime.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import click
import msgspec
import uvloop

from configs.runtime import Runtime
from configs.schema import Config, EngineConfig, GroupConfig, ModelConfig, SimConfig, TenantConfig
from ops.bench.asgi import serve_asgi
from ops.bench.harness import BenchError
from ops.valkey import EmbeddedValkey

MODEL = "sim"
START_S = 120.0


def sim_profile(step_s: float, num_replicas: int) -> Config:
    """Sim replicas whose every step takes `step_s` seconds whatever it computes (0: as fast as they can)."""
    sim = SimConfig(prefill_tokens_per_s=1e9, step_base_s=step_s, step_per_sequence_s=0.0, num_blocks=65536)
    engine = EngineConfig(kind="sim", max_num_seqs=256, max_num_batched_tokens=16384, sim=sim)
    return Config(
        cluster="bench",
        models=(ModelConfig(id=MODEL, source="sim:bytes"),),
        groups=(GroupConfig(name="sim", model=MODEL, replicas=num_replicas, engine=engine),),
        tenants=(TenantConfig(id="bench", anonymous=True),),
    )


@dataclass(slots=True)
class Stack:
    """One running stack; `async with` it. `roles` are pids by what they do."""

    config: Config
    port: int = 0
    roles: dict[str, list[int]] = field(default_factory=dict)
    _children: list[asyncio.subprocess.Process] = field(default_factory=list)
    _folder: Path | None = None
    _valkey: EmbeddedValkey | None = None

    @property
    def redis_url(self) -> str:
        assert self._valkey is not None, "the stack is not running"
        return self._valkey.url

    async def __aenter__(self) -> Stack:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stop()

    async def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="wgb-"))
        self._valkey = EmbeddedValkey(self._folder)
        self._valkey.start()
        runtime = Runtime(self._folder, self._folder, self._valkey.url, secrets.token_bytes(32), "bench")
        (self._folder / "config.json").write_bytes(msgspec.json.encode(self.config))
        (self._folder / "runtime.json").write_bytes(msgspec.json.encode(runtime, enc_hook=str))
        replicas = [await self._child("replica", f"r{i}") for i in range(self.config.groups[0].replicas)]
        ingress = await self._child("ingress", "i0")
        self.port = int(ingress[1])
        self.roles = {"ingress": [ingress[0]], "replicas": [pid for pid, _ in replicas]}

    async def _child(self, kind: str, name: str) -> tuple[int, str]:
        """Starts a process; returns its pid and the word it says when it is ready."""
        command = (sys.executable, "-m", "ops.bench.stack", kind, str(self._folder), name)
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        self._children.append(process)
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_S)
        except TimeoutError as error:
            raise BenchError(f"the {kind} {name} was not ready within {START_S:g} s") from error
        if not line:
            raise BenchError(f"the {kind} {name} did not start: see above")
        return process.pid, line.decode().strip()

    async def _stop(self) -> None:
        for process in reversed(self._children):
            if process.returncode is None:
                process.terminate()
        for process in self._children:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 10)
            if process.returncode is None:
                process.kill()
                await process.wait()
        if self._valkey is not None:
            self._valkey.stop()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


async def _told_to_stop() -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


async def _replica(config: Config, runtime: Runtime, name: str) -> None:
    from replicas.host import ReplicaHost

    host = ReplicaHost(config, config.groups[0], runtime, name)
    await host.start()
    click.echo("ready")
    await _told_to_stop()
    await host.close()


async def _ingress(config: Config, runtime: Runtime) -> None:
    from gateway import garbage
    from gateway.compose import serve_gateway

    composed = await serve_gateway(config, runtime)
    while composed.fleet.num_ready(config.models[0].id) < config.groups[0].replicas:
        await composed.fleet.change()
    garbage.settle()
    async with serve_asgi(composed.app) as served:
        click.echo(str(served.port))
        await _told_to_stop()
    await composed.close()


@click.command()
@click.argument("kind", type=click.Choice(["replica", "ingress"]))
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.argument("name")
def main(kind: str, folder: Path, name: str) -> None:
    """One process of a bench stack."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = msgspec.json.decode((folder / "config.json").read_bytes(), type=Config)
    raw = msgspec.json.decode((folder / "runtime.json").read_bytes())
    runtime = msgspec.convert(raw, type=Runtime, dec_hook=lambda kind, value: kind(value))
    uvloop.run(_replica(config, runtime, name) if kind == "replica" else _ingress(config, runtime))


if __name__ == "__main__":
    main()
