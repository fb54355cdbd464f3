"""A profile from its three layers: YAML file, then environment, then flags. The later one wins.

    WARMGATE_HTTP__PORT=8001              http.port
    WARMGATE_GROUPS__0__REPLICAS=3        groups[0].replicas
    --set http.port=8001 --set groups.0.replicas=3

Whatever is wrong raises ConfigError: one line naming the file and line (or the variable, or the flag), key and reason.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from configs import check, keys
from configs.document import Document, read_file, read_value
from configs.errors import ConfigError, KeyPath, Origin
from configs.schema import Config

PREFIX = "WARMGATE_"
PROFILES = Path(__file__).parent
SECRET_KEYS = {"keys", "key_sha256"}
"""Keys whose values no error prints."""


@dataclass(frozen=True, slots=True)
class Override:
    """One value from outside the file: `origin` says from where, `text` is what was written there."""

    origin: Origin
    key: KeyPath
    text: str


@dataclass(frozen=True, slots=True)
class Profile:
    """A resolved profile that remembers where each value came from."""

    config: Config
    document: Document

    def origin_of(self, key: KeyPath) -> Origin | None:
        """Where the value was set; None for a default."""
        return self.document.origins.get(key)

    def error(self, problem: check.Problem) -> ConfigError:
        return ConfigError(problem.reason, key=problem.key, origin=self.document.origin_of(problem.key))


def load_config(profile: str | Path, env: Mapping[str, str], overrides: Sequence[Override] = ()) -> Config:
    """The configuration of a profile (a path, or the name of a shipped one). Raises ConfigError."""
    return load_profile(profile, env, overrides).config


def load_profile(profile: str | Path, env: Mapping[str, str], overrides: Sequence[Override] = ()) -> Profile:
    """Like `load_config`, and keeps the origin of every value."""
    path = find_profile(profile)
    document = read_file(path)
    if not isinstance(document.tree, dict):
        raise ConfigError("expected a mapping of sections", origin=Origin(str(path), 1))
    try:
        keys.check_keys(document.tree)
        for override in [*environment(env), *overrides]:
            apply(document, override)
        config = msgspec.convert(document.tree, Config)
    except msgspec.ValidationError as error:
        raise _explain(error, document) from error
    except ConfigError as error:
        if error.origin is not None:
            raise
        raise ConfigError(error.reason, key=error.key, origin=document.origin_of(error.key)) from error
    loaded = Profile(config, document)
    for problem in check.problems(config):
        raise loaded.error(problem)
    return loaded


def shipped_profiles() -> list[str]:
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def find_profile(profile: str | Path) -> Path:
    """The file of a path or a shipped profile's name. Raises ConfigError when there is neither."""
    path = Path(profile).expanduser()
    if path.is_file() or isinstance(profile, Path):
        return path
    if "/" in profile or path.suffix in (".yaml", ".yml"):
        return path  # reading it says what is wrong
    shipped = shipped_profiles()
    if profile in shipped:
        return PROFILES / f"{profile}.yaml"
    close = difflib.get_close_matches(profile, shipped, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"shipped profiles: {', '.join(shipped)}"
    raise ConfigError(f"no such profile or file; {hint}", origin=Origin(profile))


def environment(env: Mapping[str, str]) -> list[Override]:
    """The variables that set something: WARMGATE_<section>[__<key>…].

    A variable without `__` whose name is no section (WARMGATE_HOME, WARMGATE_CLUSTER_SECRET) is not for the profile.
    """
    sections = Config.__struct_fields__
    found = []
    for name in sorted(env):
        if not name.startswith(PREFIX):
            continue
        parts = name.removeprefix(PREFIX).lower().split("__")
        if len(parts) == 1 and parts[0] not in sections:
            continue
        found.append(Override(Origin(f"environment variable {name}"), _key_path(parts), env[name]))
    return found


def setting(text: str) -> Override:
    """What `--set KEY=VALUE` says. Raises ConfigError when it is not of that form."""
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError("expected KEY=VALUE, like http.port=8001", origin=Origin(f"--set {text}"))
    parts = re.sub(r"\[(\d+)\]", r".\1", name).split(".")
    return Override(Origin(f"--set {name}"), _key_path(parts), value)


def apply(document: Document, override: Override) -> None:
    """Writes one override into the document. Raises ConfigError with the override's origin."""
    key = override.key
    try:
        kind = keys.type_at(key)
        value = _read(override.text, kind)
        keys.check_keys(value, kind, key)
        parent = document.tree
        for depth in range(len(key) - 1):
            parent = _child(parent, key[: depth + 1], [] if isinstance(key[depth + 1], int) else {})
        _put(parent, key, value)
    except ConfigError as error:
        raise ConfigError(error.reason, key=error.key or key, origin=override.origin) from error
    for known in [known for known in document.origins if known[: len(key)] == key]:
        del document.origins[known]
    document.origins[key] = override.origin


def _key_path(parts: Sequence[str]) -> KeyPath:
    return tuple(int(part) if part.isascii() and part.isdigit() else part for part in parts)


def _read(text: str, kind: Any) -> Any:
    """The value of a variable's text, given what type is expected: for a word `8000` is a word."""
    if keys.takes_text(kind):
        return None if text == "null" else text
    if keys.takes_list(kind) and text and not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",")]
    return read_value(text)


def _child(parent: Any, path: KeyPath, empty: Any) -> Any:
    part = path[-1]
    if isinstance(parent, dict):
        if parent.get(str(part)) is None:
            parent[str(part)] = empty
        return parent[str(part)]
    _refuse_gap(parent, path)
    if part == len(parent):
        parent.append(empty)
    return parent[int(part)]


def _put(parent: Any, path: KeyPath, value: Any) -> None:
    part = path[-1]
    if isinstance(parent, dict):
        parent[str(part)] = value
        return
    _refuse_gap(parent, path)
    parent[int(part) : int(part) + 1] = [value]


def _refuse_gap(parent: Any, path: KeyPath) -> None:
    if not isinstance(parent, list) or not isinstance(path[-1], int):
        raise ConfigError("the file has another kind of value here", key=path)
    if path[-1] > len(parent):
        raise ConfigError(f"there is no entry {path[-1]}: the list has {len(parent)}", key=path)


def _explain(error: msgspec.ValidationError, document: Document) -> ConfigError:
    """msgspec's words, the value it saw, and the place: 'Expected `int` >= 1 - at `$.groups[0].replicas`'."""
    words, _, at = str(error).partition(" - at `$")
    key = _key_path([part for part in re.split(r"[.\[\]]+", at.rstrip("`")) if part])
    missing = re.match(r"Object missing required field `(\w+)`", words)
    if missing:
        return ConfigError("missing key", key=(*key, missing[1]), origin=document.origin_of(key))
    words = words.replace("`", "")
    value: Any = document.tree
    for part in key:
        value = value[part]
    words = words[0].lower() + words[1:].partition(", got ")[0]
    words = words.replace("expected object", "expected a mapping").replace("expected array", "expected a list")
    if words.startswith("invalid enum value"):
        words = f"expected one of {', '.join(_choices(keys.type_at(key)))}"
    if not SECRET_KEYS & set(key):
        words += f", got {_shown(value)}"
    return ConfigError(words, key=key, origin=document.origin_of(key))


def _shown(value: Any) -> str:
    """A value as its author would know it again; lists and mappings by their kind."""
    kinds = {dict: "a mapping", list: "a list", type(None): "null", bool: str(value).lower()}
    return kinds.get(type(value), repr(value))


def _choices(kind: Any) -> list[str]:
    """Of a Literal, or a Literal or nothing."""
    options = getattr(kind, "__args__", ())
    literals = [option for option in options if get_origin(option) is Literal]
    return [str(choice) for choice in (get_args(literals[0]) if literals else options)]
