"""The real stack, started once: Ray, HAProxy, Valkey, two ingress replicas, two native replicas on SmolLM2."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import psutil
import pytest

MODEL = "smollm2-135m"
START_LIMIT_S = 240.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Stack:
    """One running `warmgate serve`."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    overrides: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def replica_pids(self, group: str) -> list[int]:
        """Pids of the actor processes that run this group's engines."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            title = " ".join(_cmdline(child))
            if title.startswith("ray::") and "ServeReplica" in title and group in title:
                found.append(child.pid)
        return sorted(found)

    def tree(self) -> set[int]:
        return {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}

    def wait_ready(self, limit_s: float = START_LIMIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"not ready after {limit_s} s; its log ends:\n{self.log.read_text()[-6000:]}")

    def stop(self, how: signal.Signals = signal.SIGINT, limit_s: float = 90.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


PATIENCE = "channel.dead_after_s=8"
"""A replica that dies closes its socket; one that is silent for two seconds may be on a machine that is busy."""


def start_stack(profile: str, folder: Path, *overrides: str) -> Stack:
    port = free_port()
    log = folder / f"serve-{port}.log"
    command = [sys.executable, "-m", "ops.cli", "serve", profile, "--port", str(port)]
    for override in (PATIENCE, *overrides):
        command += ["--set", override]
    environment = {**os.environ, "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    return Stack(process, port, log, list(overrides))


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    running = start_stack("quickstart", folder, "cluster=e2e", "http.ingress_replicas=2")
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture()
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{stack.url}/v1", api_key="unused", timeout=120, max_retries=0, _strict_response_validation=True
    ) as made:
        yield made


@pytest.fixture()
def lenient(client: openai.OpenAI) -> Iterator[openai.OpenAI]:
    """For the answers OpenAI itself gives against its own SDK's types: a null first logprob under `echo`."""
    with openai.OpenAI(base_url=client.base_url, api_key="unused", timeout=120, max_retries=0) as made:
        yield made
