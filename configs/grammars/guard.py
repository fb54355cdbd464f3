"""Tries grammars in a process of its own, bounded in CPU time, memory and stack, before anybody uses them.

The library that compiles grammars recurses over them, and some small ones cost it minutes or gigabytes: a chain of a
thousand references overflows its stack, which no process survives. So every grammar is first compiled, and followed a
few steps, where that does no harm.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from configs.grammars.frames import Verdict, read_frame, write_frame
from configs.grammars.source import MAX_SOURCE_BYTES, GrammarError, GrammarSource

START_S = 30.0
"""What a start of the process may take on a busy machine, and by how much a check may outlast its CPU time."""

_WORDS: Mapping[int, str] = {
    -signal.SIGPROF: "it takes too long to compile",
    -signal.SIGSEGV: "it is nested too deeply",
    -signal.SIGABRT: "it takes too much memory to compile",
}


@dataclass(frozen=True, slots=True)
class GuardLimits:
    """Of one check. `max_cpu_s`: CPU seconds; `max_bytes`: memory beyond that of the idle process."""

    max_cpu_s: float = 0.5
    max_bytes: int = 256 * 1024 * 1024


class GrammarGuard:
    """One process, started when first needed and again when a grammar has killed it. Any thread may call; checks take
    turns."""

    def __init__(self, limits: GuardLimits | None = None) -> None:
        self._limits = limits or GuardLimits()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def check(self, source: GrammarSource) -> str:
        """What the grammar becomes, in llguidance's format. Blocks. Raises GrammarError when it cannot be used, OSError
        when no process can be started, or it ends for no fault of the grammar."""
        if source.num_bytes > MAX_SOURCE_BYTES:
            raise GrammarError(
                f"it has {source.num_bytes} characters, at most {MAX_SOURCE_BYTES} are allowed", too_complex=True
            )
        with self._lock:
            frame = self._ask(source) or self._ask(source)
        if frame is None:
            raise OSError("the grammar guard's process was killed")
        verdict = msgspec.msgpack.decode(frame, type=Verdict)
        if verdict.grammar is None:
            raise GrammarError(verdict.message, too_complex=verdict.too_complex)
        return verdict.grammar

    def close(self) -> None:
        """Ends the process. Idempotent."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()  # also ends a check under way
        with self._lock:
            if self._process is not None:
                self._process.kill()
                _end(self._process)
                self._process = None

    def _ask(self, source: GrammarSource) -> bytes | None:
        """None when somebody else has killed the process, such as a machine out of memory."""
        process = self._running()
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(START_S + self._limits.max_cpu_s, give_up)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                write_frame(_pipe(process.stdin), msgspec.msgpack.encode(source))
            frame = read_frame(_pipe(process.stdout))
        finally:
            timer.cancel()
        if frame is not None:
            return frame
        _end(process)
        self._process = None
        if process.returncode in _WORDS:
            raise GrammarError(_WORDS[process.returncode], too_complex=True)
        if process.returncode == -signal.SIGKILL and not late.is_set():
            return None
        raise OSError(f"the grammar guard's process ended with {process.returncode}")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise OSError("the grammar guard is closed")
        if self._process is None or self._process.poll() is not None:
            if self._process is not None:
                _end(self._process)
            self._process = _start(self._limits)
            if self._closed:  # meanwhile: `close` has killed the one before, and waits for this turn to end
                self._process.kill()
                raise OSError("the grammar guard is closed")
        return self._process


def _start(limits: GuardLimits) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "configs.grammars.child", str(limits.max_cpu_s), str(limits.max_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Waits for a process whose pipes are to be closed."""
    with contextlib.suppress(OSError):
        _pipe(process.stdin).close()
    _pipe(process.stdout).close()
    process.wait()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "opened by _start"
    return stream
