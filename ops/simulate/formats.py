"""Which reader a trace file wants: told by its name's ending and its first line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

from ops.simulate.errors import TraceError
from ops.simulate.readers import json_lines, read_azure, read_mooncake, read_sessions
from ops.simulate.servegen import read_servegen
from ops.simulate.trace import Trace
from ops.simulate.usage_log import read_usage_log

Format: TypeAlias = Literal["mooncake", "sessions", "azure", "servegen", "usage"]

READERS: dict[Format, Callable[[Path], Trace]] = {
    "mooncake": read_mooncake,
    "sessions": read_sessions,
    "azure": read_azure,
    "servegen": read_servegen,
    "usage": read_usage_log,
}

_MARKS: dict[str, Format] = {"hash_ids": "mooncake", "requests": "sessions", "num_completion_tokens": "usage"}
"""A key that only one format's lines have."""


def load_trace(path: Path, format_name: Format | None = None) -> Trace:
    """Reads a trace in the format it has. Raises TraceError naming file and line."""
    return READERS[format_name or sniff(path)](path)


def sniff(path: Path) -> Format:
    """The format of a file; raises TraceError when it is none of ours."""
    if path.suffix == ".csv":
        return "azure"
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return "servegen"
    for line, row in json_lines(path):
        for key, name in _MARKS.items():
            if key in row:
                return name
        raise TraceError(path, line, f"no format of ours has these keys: {', '.join(map(str, row))}")
    raise TraceError(path, None, "there are no requests in it")
