"""A real Valkey per test, on a Unix socket in the test's own folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.valkey import server_binary


class Valkey:
    """One server that tests start, stop, freeze and kill. `raw` talks to it past our own store."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "v.sock"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    def start(self) -> None:
        options = {
            "port": "0",
            "unixsocket": str(self.path),
            "unixsocketperm": "600",
            "dir": str(self._folder),
            "save": "",
            "appendonly": "no",
            "loglevel": "warning",
        }
        command = [str(server_binary()), *(part for k, v in options.items() for part in (f"--{k}", v))]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up = time.monotonic() + 30
        while time.monotonic() < give_up:
            with contextlib.suppress(OSError):
                if self.raw("PING") == b"+PONG\r\n":
                    return
            time.sleep(0.01)
        raise AssertionError("valkey did not start")

    def signal(self, signum: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signum)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self.path.unlink(missing_ok=True)

    def raw(self, *words: str | bytes) -> bytes:
        """Sends one command, returns the raw reply."""
        parts = [w.encode() if isinstance(w, str) else w for w in words]
        wire = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(2)
            sock.connect(str(self.path))
            sock.sendall(wire)
            return sock.recv(1 << 20)


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    folder = Path(tempfile.mkdtemp(prefix="wg-test-"))  # pytest's own folders can be too long for a socket path
    server = Valkey(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder)
