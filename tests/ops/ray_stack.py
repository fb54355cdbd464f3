"""`warmgate serve` as a process of its own, for tests with a real Ray; and what its process tree looks like."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

START_LIMIT_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(holds: Callable[[], bool], limit_s: float = 60.0) -> bool:
    """Whether it holds within the time."""
    end = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@dataclass(slots=True)
class Stack:
    """One `warmgate serve`, leader of a session of its own, as under a terminal."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def said(self, text: str) -> bool:
        return text in self.log.read_text()

    def wait_ready(self) -> None:
        ended = eventually(lambda: self.said("is ready (") or self.process.poll() is not None, START_LIMIT_S)
        assert ended and self.process.poll() is None, f"not ready:\n{self.log.read_text()}"

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def actors(self, deployment: str) -> list[psutil.Process]:
        """The live processes of a Serve deployment, or other Ray processes with such a title."""
        return [p for p in self.family() if (t := title(p)).startswith("ray::") and deployment in t]

    def named(self, name: str) -> list[psutil.Process]:
        return [p for p in self.family() if alive(p) and p.name() == name]

    def chat(self, **fields: object) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=chat_body(**fields), timeout=30)

    @contextmanager
    def stream(self, **fields: object) -> Iterator[Iterator[str]]:
        """The `data:` payloads of a streamed chat, as they come."""
        url, body = f"{self.url}/v1/chat/completions", chat_body(stream=True, **fields)
        with httpx.stream("POST", url, json=body, timeout=60) as response:
            assert response.status_code == 200, response.read()
            yield (line[6:] for line in response.iter_lines() if line.startswith("data: "))

    def interrupt_group(self) -> None:
        """What a terminal does at Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)


def chat_body(**fields: object) -> dict[str, object]:
    return {"model": "sim", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8, **fields}


def text_of(payloads: list[str]) -> str:
    chunks = [json.loads(p) for p in payloads if p != "[DONE]"]
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) if process.status() != psutil.STATUS_ZOMBIE else ""
    except psutil.NoSuchProcess:
        return ""


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def listens(process: psutil.Process) -> set[tuple[str, int]]:
    """Addresses a process listens on; IPv4 ones in their IPv6 dress are undressed."""
    try:
        found = process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return set()
    return {(c.laddr.ip.removeprefix("::ffff:"), c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}


def start(log: Path, *settings: str, profile: str = "sim", options: Sequence[str] = ()) -> Stack:
    """Starts a stack on a free port; `settings` are KEY=VALUE, `options` further words. Does not wait."""
    port = free_port()
    words = [sys.executable, "-m", "ops.cli", "serve", profile, "--port", str(port)]
    words += [word for setting in settings for word in ("--set", setting)]
    words += options
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    return Stack(process, port, log)


def stop(stack: Stack) -> None:
    """Ends a stack however it is; for the end of a test."""
    if stack.process.poll() is None:
        stack.process.send_signal(signal.SIGTERM)
        try:
            stack.process.wait(60)
        except subprocess.TimeoutExpired:
            stack.process.kill()  # its guard ends the rest
            stack.process.wait()
            raise
    for folder in Path(f"/tmp/wg-{os.getuid()}").glob(f"*-{stack.port}"):  # kept by a run that failed or was killed
        shutil.rmtree(folder)
