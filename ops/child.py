"""Starts a program that must not outlive the process that asked for it.

    python -m ops.child PARENT_PID PROGRAM [ARGUMENT…]

On Linux the kernel does it: the child asks for SIGKILL at its parent's death, then becomes the program. Elsewhere this
process stays, and ends the program when the parent is gone. The kernel counts the *thread* that started the child as
its parent, so start it from one that lives as long as the child should.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1


def command(program: list[str]) -> list[str]:
    """The command line that runs `program` as a child of this process and no longer than it.

    Runs this file by its path: it must not depend on the child's working folder.
    """
    return [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid()), *program]


def _become(parent: int, program: list[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before we asked
        sys.exit(1)
    os.execv(program[0], program)


def _watch(parent: int, program: list[str]) -> int:
    process = subprocess.Popen(program)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while process.poll() is None:
        if os.getppid() != parent:
            process.kill()
        time.sleep(0.2)
    return process.returncode


def main() -> None:
    parent, program = int(sys.argv[1]), sys.argv[2:]
    if sys.platform.startswith("linux"):
        _become(parent, program)
    sys.exit(_watch(parent, program))


if __name__ == "__main__":
    main()
