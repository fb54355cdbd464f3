"""Which processes belong to an instance, and how they all end: by pid, never by name."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> bool:
    """Makes this process the parent of its descendants' orphans (Linux), so that `Family` never loses sight of one.

    Returns False where the kernel has no such thing.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


@dataclass(slots=True)
class Family:
    """The descendants this process gained since `Family` was made; those it had before are not ours to end."""

    _before: frozenset[psutil.Process] = field(default_factory=lambda: frozenset(psutil.Process().children()))
    _seen: set[psutil.Process] = field(default_factory=set)

    def members(self) -> list[psutil.Process]:
        """Every live member, the oldest first; also those whose parent died, as far as they were seen before."""
        me = psutil.Process()
        fresh: set[psutil.Process] = set()
        for child in me.children():
            if child in self._before:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                fresh.update((child, *child.children(recursive=True)))
        self._seen = {p for p in self._seen | fresh if _alive(p)}
        return sorted(self._seen, key=lambda p: (p.create_time(), p.pid))

    def reap(self) -> None:
        """Collects adopted zombies, so that they do not pile up under this process."""
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
                if child not in self._before and child.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(child.pid, os.WNOHANG)

    def end(self, grace_s: float) -> list[int]:
        """Terminates every member, kills after `grace_s` what still lives; returns the pids that had to be killed.

        Members may start others while they end, so this repeats until none is left.
        """
        _signal(self.members(), signal.SIGTERM)
        _, alive = psutil.wait_procs(self.members(), timeout=grace_s)
        killed = [p.pid for p in alive]
        self.kill()
        return killed

    def kill(self) -> None:
        """Kills every member at once; safe to call from a signal handler."""
        for _ in range(10):
            members = self.members()
            if not members:
                break
            _signal(members, signal.SIGKILL)
            psutil.wait_procs(members, timeout=1.0)
        self.reap()


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(processes: Iterable[psutil.Process], signum: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signum)
