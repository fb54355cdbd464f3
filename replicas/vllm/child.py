"""Ends vLLM's processes when the replica that started them is gone, however it went; keeps why one did not start.

vLLM's engine core notices nothing when its parent is killed: it waits for requests for ever, with the model in memory.
What fails in it is told on its stderr only. vLLM calls its plugins (entry points `vllm.general_plugins`) first thing in
each of its processes; `watch` is ours. Only the standard library is imported here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from pathlib import Path

VARIABLE = "WARMGATE_VLLM_PARENT"
"""Holds what `mark` gives; inherited by every process below the replica."""

FOLDER = "VLLM_RPC_BASE_PATH"
"""Names the folder of vLLM's sockets, the replica's own; `_WHY` is written there."""

_WHY = "why"
_THREAD = "watch the replica"
_POLL_S = 0.5


def mark() -> str:
    """This process, told from a later one with the same id: pid and start time."""
    return f"{os.getpid()}:{_started(os.getpid())}"


def watch() -> None:
    """Begins to watch the process that `VARIABLE` names; does nothing without one, in that process, or twice."""
    marked = os.environ.get(VARIABLE, "")
    pid, _, started = marked.partition(":")
    if not pid.isdigit() or int(pid) == os.getpid():
        return
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        return
    threading.Thread(target=_until_gone, args=(int(pid), started), name=_THREAD, daemon=True).start()
    if folder := os.environ.get(FOLDER):
        logging.getLogger("vllm").addHandler(_FirstFailure(Path(folder)))


def why(folder: Path) -> str:
    """The first exception that one of vLLM's processes has logged, in a line; empty where none has."""
    with contextlib.suppress(OSError):
        return (folder / _WHY).read_bytes().decode(errors="replace")
    return ""


class _FirstFailure(logging.Handler):
    """Writes the first exception that is logged as an error to `folder`; of a traceback passed on as text, its end."""

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = folder / _WHY

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            with contextlib.suppress(Exception):  # vLLM goes on to say that it is dead: nothing may come between
                self._keep(error)

    def _keep(self, error: BaseException) -> None:
        text = str(error)
        lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
        said = lines[-1] if lines[0].startswith("Traceback") else f"{type(error).__name__}: {lines[0]}"
        with self._path.open("xb") as file:
            file.write(said[:500].encode(errors="replace"))


def _until_gone(pid: int, started: str) -> None:
    try:
        _wait(pid, started)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def _wait(pid: int, started: str) -> None:
    """Returns when the process has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # not Linux, or an old one
        while _started(pid) == started and _is_alive(pid):
            time.sleep(_POLL_S)
        return
    if _started(pid) == started:  # else somebody else has the number by now
        select.select([handle], [], [])


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _started(pid: int) -> str:
    """Ticks since boot at which a process started; empty where nobody says."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
