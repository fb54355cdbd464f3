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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import click
import msgspec
import uvloop

from configs.runtime import Runtime
from configs.schema import Config, EngineConfig, GroupConfig, ModelConfig, SimConfig, TenantConfig
from ops import child
from ops.bench.asgi import serve_asgi
from ops.bench.harness import BenchError
from ops.bench.last_words import last_words
from ops.valkey import EmbeddedValkey

MODEL = "sim"
START_S = 120.0
_LOG_TAIL_BYTES = 200_000


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StackOptions:
    """`home`: where models are; None: the stack's own empty folder, enough for what needs none. `log`: the file that
    its processes' stderr goes to; None: to ours. `start_s`: what each may take to be ready. `environment(i)`: variables
    of replica i on top of ours."""

    home: Path | None = None
    log: Path | None = None
    start_s: float = field(default_factory=lambda: START_S)
    environment: Callable[[int], Mapping[str, str]] = lambda _: {}


@dataclass(slots=True)
class Stack:
    """One running stack; `async with` it, which raises BenchError when it does not start. `roles` are pids by what
    they do."""

    config: Config
    options: StackOptions = field(default_factory=StackOptions)
    port: int = 0
    roles: dict[str, list[int]] = field(default_factory=dict)
    _children: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
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
            await self._stopped()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stopped()

    async def _stopped(self) -> None:
        """Everything is ended, also where this is cancelled meanwhile."""
        stopping = asyncio.ensure_future(self._stop())
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            await stopping
            raise

    async def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="wgb-"))
        self._valkey = EmbeddedValkey(self._folder)
        self._valkey.start()
        home = self.options.home or self._folder
        runtime = Runtime(self._folder, home, self._valkey.url, secrets.token_bytes(32), "bench")
        (self._folder / "config.json").write_bytes(msgspec.json.encode(self.config))
        (self._folder / "runtime.json").write_bytes(msgspec.json.encode(runtime, enc_hook=str))
        numbers = range(self.config.groups[0].replicas)
        replicas = await asyncio.gather(
            *(self._child("replica", f"r{i}", self.options.environment(i)) for i in numbers)
        )
        ingress = await self._child("ingress", "i0", {})
        self.port = int(ingress[1])
        self.roles = {"ingress": [ingress[0]], "replicas": [pid for pid, _ in replicas]}

    async def _child(self, kind: str, name: str, environment: Mapping[str, str]) -> tuple[int, str]:
        """Starts a process; returns its pid and the word it says when it is ready."""
        assert self._folder is not None
        program = [sys.executable, "-m", "ops.bench.stack", kind, str(self._folder), name]
        with contextlib.ExitStack() as opened:
            log = self.options.log
            process = await asyncio.create_subprocess_exec(
                *child.command(program),
                stdout=asyncio.subprocess.PIPE,
                stderr=None if log is None else opened.enter_context(log.open("ab")),
                env={**os.environ, **environment},
                process_group=0,  # a Ctrl-C is for us, who end our processes in order
            )
        self._children[name] = process
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), self.options.start_s)
        except TimeoutError as error:
            raise BenchError(f"the {kind} {name} was not ready within {self.options.start_s:g} s") from error
        if not line:
            raise BenchError(f"the {kind} {name} did not start: {self._reason(await process.wait())}")
        return process.pid, line.decode().strip()

    def fallen(self) -> str:
        """Which of its processes has ended by itself, and why; empty while all run."""
        for name, process in self._children.items():
            if process.returncode is not None:
                return f"{name} ended: {self._reason(process.returncode)}"
        return ""

    def _reason(self, status: int) -> str:
        log = self.options.log
        if log is None:
            return "see above"
        return last_words(log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace"), status)

    async def _stop(self) -> None:
        for process in reversed(self._children.values()):
            if process.returncode is None:
                process.terminate()
        for process in self._children.values():
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


Say: TypeAlias = Callable[[str], None]
"""Says a word to the process that started this one."""


def _own_words() -> Say:
    """What engines write to stdout goes to stderr from here on: it would be taken for a word of ours, and block when
    nobody reads it."""
    words = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    return lambda word: click.echo(word, file=words)


async def _replica(config: Config, runtime: Runtime, name: str, say: Say) -> None:
    from replicas.host import ReplicaHost

    host = ReplicaHost(config, config.groups[0], runtime, name)
    await host.start()
    say("ready")
    await _told_to_stop()
    await host.close()


async def _ingress(config: Config, runtime: Runtime, say: Say) -> None:
    from gateway import garbage
    from gateway.compose import serve_gateway

    composed = await serve_gateway(config, runtime)
    while composed.fleet.num_ready(config.models[0].id) < config.groups[0].replicas:
        await composed.fleet.change()
    garbage.settle()
    async with serve_asgi(composed.app) as served:
        say(str(served.port))
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
    say = _own_words()
    uvloop.run(_replica(config, runtime, name, say) if kind == "replica" else _ingress(config, runtime, say))


if __name__ == "__main__":
    main()
