"""A resolved profile as YAML, each value with its origin in a comment."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import yaml

from configs.check import without_password
from configs.errors import KeyPath
from configs.load import Profile

HIDDEN = "***"


def annotated_yaml(profile: Profile) -> str:
    """Every key with its value and, as a comment, where it was set. API keys and passwords are not printed."""
    rows: list[tuple[str, str]] = []
    _section(profile, msgspec.to_builtins(profile.config), (), rows)
    width = min(48, max(len(text) for text, _ in rows))
    return "".join(f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in rows)


def _section(profile: Profile, value: dict[str, Any], path: KeyPath, rows: list[tuple[str, str]]) -> None:
    for key, item in value.items():
        _entry(profile, f"{_indent(path)}{key}:", item, (*path, key), rows)


def _entry(profile: Profile, head: str, item: Any, path: KeyPath, rows: list[tuple[str, str]]) -> None:
    if isinstance(item, dict) and item:
        rows.append((head, ""))
        _section(profile, item, path, rows)
    elif isinstance(item, (list, tuple)) and any(isinstance(entry, dict) for entry in item):
        rows.append((head, ""))
        for i, entry in enumerate(item):
            first = len(rows)
            _section(profile, entry, (*path, i), rows)
            text, comment = rows[first]
            dash = len(_indent((*path, i))) - 2
            rows[first] = (f"{text[:dash]}- {text[dash + 2 :]}", comment)
    else:
        origin = profile.origin_of(path)
        rows.append((f"{head} {_scalar(path, item)}", "default" if origin is None else str(origin)))


def _indent(path: KeyPath) -> str:
    """Two spaces a level; an entry of a list is one level, as its dash stands in the indentation."""
    return "  " * len(path)


def _scalar(path: KeyPath, item: Any) -> str:
    if "keys" in path and item:
        item = [HIDDEN] * len(item)
    if path == ("redis", "url") and "@" in item:
        item = without_password(item)
    if isinstance(item, (list, tuple, dict)):
        return json.dumps(item)
    return yaml.safe_dump(item, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
