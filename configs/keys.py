"""The schema seen from a key path: which keys a section knows, what type a value has.

msgspec checks types and ranges; this adds what its errors lack, the place and a suggestion for an unknown key.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from configs.errors import ConfigError, KeyPath, show_key
from configs.schema import Config


def check_keys(value: Any, kind: Any = Config, path: KeyPath = ()) -> None:
    """Raises ConfigError at the first key in the value tree that the schema does not know."""
    for option in _options(kind):
        if isinstance(value, dict) and _is_section(option):
            fields = section_fields(option)
            for key, item in value.items():
                if key not in fields:
                    raise unknown_key((*path, key), fields)
                check_keys(item, fields[key], (*path, key))
        elif isinstance(value, list) and get_origin(option) is tuple:
            for i, item in enumerate(value):
                check_keys(item, get_args(option)[0], (*path, i))


def type_at(path: KeyPath) -> Any:
    """The annotation of the value at a path. Raises ConfigError where the schema has no such key."""
    kind: Any = Config
    for depth, part in enumerate(path):
        kind = _step_into(kind, path[: depth + 1], part)
    return kind


def _step_into(kind: Any, path: KeyPath, part: str | int) -> Any:
    for option in _options(kind):
        if _is_section(option) and isinstance(part, str):
            fields = section_fields(option)
            if part not in fields:
                raise unknown_key(path, fields)
            return fields[part]
        if get_origin(option) is tuple and isinstance(part, int):
            return get_args(option)[0]
        if get_origin(option) is dict:
            return get_args(option)[1]
    around = show_key(path[:-1])
    if any(get_origin(option) is tuple for option in _options(kind)):
        raise ConfigError(f"{around} is a list: expected an index, got {part!r}", key=path)
    raise ConfigError(f"{around} has no keys below it", key=path)


def takes_text(kind: Any) -> bool:
    """Whether a value of this type is a word or text, so that `8000` means the text and not the number."""
    return any(o is str or (get_origin(o) is Literal and isinstance(get_args(o)[0], str)) for o in _options(kind))


def takes_list(kind: Any) -> bool:
    return any(get_origin(option) is tuple for option in _options(kind))


def section_fields(section: Any) -> dict[str, Any]:
    """Name → annotation of a section's fields."""
    hints = get_type_hints(section, include_extras=True)
    return {name: hints[name] for name in section.__struct_fields__}


def unknown_key(path: KeyPath, known: Iterable[str]) -> ConfigError:
    known = list(known)
    close = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
    return ConfigError(f"unknown key; {hint}", key=path)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _options(kind: Any) -> list[Any]:
    """The members of a union (a single type is a union of one), stripped of constraints."""
    if get_origin(kind) is Annotated:
        return _options(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [option for member in get_args(kind) for option in _options(member)]
    return [kind]
