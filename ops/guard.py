"""Ends what a killed supervisor leaves behind (Linux; standard library only, so that it is small and starts fast).

    guard.py RUN_DIR RAY_DIR        stdin: a pipe from the supervisor

When the pipe closes, the supervisor has ended, however it did; what of its instance still runs then is killed. After
an orderly stop that is nothing.

The kernel ends Ray's head processes with the supervisor (PR_SET_PDEATHSIG) and Ray's workers end with the raylet; what
is left without a guard are Ray's two agents, for 60 s, and whatever a worker had started itself.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

MARKER_NAME = "WARMGATE_RUN_DIR"
PERIOD_S = 0.1
SWEEPS = 30


@dataclass(frozen=True)
class Mark:
    """How to tell an instance's processes: all of them started with WARMGATE_RUN_DIR in their environment. Ray's
    workers and agents write their title over it; those are called `ray::…` and keep files open in Ray's folder."""

    run_dir: str
    ray_dir: str

    def owned(self) -> list[int]:
        """Pids of this user's live processes of the instance; this process excepted."""
        pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
        return [pid for pid in pids if pid != os.getpid() and self._owns(pid)]

    def _owns(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/environ", "rb") as environ:
                if f"{MARKER_NAME}={self.run_dir}".encode() in environ.read().split(b"\0"):
                    return True
            with open(f"/proc/{pid}/cmdline", "rb") as cmdline:
                if cmdline.read(5) != b"ray::":
                    return False
            with os.scandir(f"/proc/{pid}/fd") as files:
                return any(os.readlink(file.path).startswith(f"{self.ray_dir}/") for file in files)
        except OSError:
            return False  # another user's, or just ended: not ours to end


def sweep(mark: Mark, sleep: Callable[[float], None] = time.sleep) -> int:
    """Kills the instance's processes until two looks in a row find none; returns how many there were.

    One look is not enough: a process may be between fork and exec, or start another while it dies.
    """
    killed: set[int] = set()
    quiet = 0
    for _ in range(SWEEPS):
        pids = mark.owned()
        quiet = 0 if pids else quiet + 1
        if quiet == 2:
            break
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed.update(pids)
        sleep(PERIOD_S)
    return len(killed)


def main() -> None:
    """Waits for the end of stdin, then sweeps."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # the guard goes last
    while os.read(sys.stdin.fileno(), 1024):
        pass
    sweep(Mark(sys.argv[1], sys.argv[2]))


if __name__ == "__main__":
    main()
