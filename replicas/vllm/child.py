"""Ends vLLM's processes when the replica that started them is gone, however it went.

vLLM's engine core notices nothing when its parent is killed: it waits for requests for ever, with the model in memory.
vLLM calls its plugins (entry points `vllm.general_plugins`) first thing in each of its processes; `watch` is ours. Only
the standard library is imported here.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from pathlib import Path

VARIABLE = "WARMGATE_VLLM_PARENT"
"""Holds what `mark` gives; inherited by every process below the replica."""

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
