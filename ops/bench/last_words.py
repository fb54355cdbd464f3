"""Why a process ended, in a line, from what it and its own processes wrote to stderr."""

from __future__ import annotations

import re
import signal

_RAISED = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)): (\S.*)$")
_POINTERS = ("root cause", "core initialization failed", "did not start", "Broken pipe", "Connection reset")
"""Words of errors that only tell of another one."""

_MAX = 300


def last_words(text: str, status: int | None) -> str:
    """The last exception that says something itself, else the last line, else the exit `status`."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [f"{found[1].rpartition('.')[2]}: {found[2]}" for line in lines if (found := _RAISED.search(line))]
    telling = [words for words in raised if not any(pointer in words for pointer in _POINTERS)]
    if status is not None and status < 0 and not telling:
        return _killed(-status)
    last = (telling or raised or lines or [f"it ended with status {status}"])[-1]
    return last if len(last) <= _MAX else f"{last[:_MAX]}…"


def _killed(number: int) -> str:
    name = signal.Signals(number).name if number in {s.value for s in signal.Signals} else str(number)
    why = ", as the system does when memory runs out" if number == signal.SIGKILL else ""
    return f"it was ended by {name}{why}"
