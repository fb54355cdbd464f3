"""Where a setting came from, and the one error that says what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

KeyPath: TypeAlias = tuple[str | int, ...]
"""The way to a value in a profile: `("groups", 0, "replicas")`."""


def show_key(path: KeyPath) -> str:
    """The path as a person writes it: `groups[0].replicas`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


@dataclass(frozen=True, slots=True)
class Origin:
    """What set a value: a file (with its line), an environment variable, or a flag."""

    name: str
    line: int | None = None

    def __str__(self) -> str:
        return self.name if self.line is None else f"{self.name}:{self.line}"


class ConfigError(Exception):
    """The configuration cannot be used. Its text is one line: place, key, reason.

    `origin`: file and line, or the variable or flag; None when no single place is to blame.
    """

    def __init__(self, reason: str, *, key: KeyPath = (), origin: Origin | None = None) -> None:
        self.reason = reason
        self.key = key
        self.origin = origin
        place = "" if origin is None else f"{origin}: "
        shown = f"{show_key(key)}: " if key else ""
        super().__init__(f"{place}{shown}{reason}".replace("\n", " "))
