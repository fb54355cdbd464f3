"""What goes wrong in a simulation in a way that is the user's to read."""

from __future__ import annotations

from pathlib import Path

from ops.errors import OperationError


class SimulationError(OperationError):
    """A simulation cannot run as asked; the message says why."""


class TraceError(SimulationError):
    """A trace cannot be read: names the file and, where there is one, the line."""

    def __init__(self, path: Path | str, line: int | None, reason: str) -> None:
        where = f"{path}" if line is None else f"{path}, line {line}"
        super().__init__(f"{where}: {reason}")
        self.line = line
