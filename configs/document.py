"""YAML with a memory of lines: plain values, and for every key path where it was written.

Scalars follow YAML 1.2's core schema, not 1.1's: `on` and `no` are words, `1e-3` is a number, `010` is ten and `12:30`
is text. Keys must be strings, each once in its mapping.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from configs.errors import ConfigError, KeyPath, Origin

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": re.compile(r"^(?:~|null|Null|NULL|)$"),
    "bool": re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"^(?:[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+)$"),
    "float": re.compile(
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF|nan|NaN|NAN))$"
    ),
}


class _Loader(yaml.SafeLoader):
    """Knows the core schema's scalars only, and `<<`."""


_Loader.yaml_implicit_resolvers = {}
for _name, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", _pattern, None)
_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile(r"^<<$"), ["<"])


@dataclass(slots=True)
class Document:
    """A value tree of dicts, lists and scalars, and the origin of every path in it."""

    tree: Any
    origins: dict[KeyPath, Origin] = field(default_factory=dict)

    def origin_of(self, path: KeyPath) -> Origin | None:
        """Where the value at `path` was written, or else the nearest section around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return None


def read_file(path: Path) -> Document:
    """Reads a profile. Raises ConfigError for a missing file, bad syntax, a duplicate key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("no such file", origin=Origin(str(path))) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", origin=Origin(str(path))) from error
    return read_text(text, str(path))


def read_text(text: str, name: str) -> Document:
    """Like `read_file`, of text that is called `name` in errors."""
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"not valid YAML: {error.reason}", origin=Origin(name, line)) from error
    try:
        node = loader.get_single_node()
        if node is None:
            raise ConfigError("the profile is empty", origin=Origin(name, 1))
        document = Document(None)
        document.tree = _Builder(loader, name, document.origins).build(node, ())
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, name) from error
    except RecursionError:
        raise ConfigError("nested too deeply", origin=Origin(name)) from None
    finally:
        loader.dispose()
    return document


def read_value(text: str) -> Any:
    """One value as an environment variable or flag carries it: a scalar, or a list or mapping in flow style."""
    return read_text(text, "value").tree if text.strip() else ""


class _Dumper(yaml.SafeDumper):
    """Quotes whatever the loader would read as something else than text."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def write_text(tree: Any) -> str:
    """YAML that `read_text` reads as this tree of dicts, lists and scalars again."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _syntax_error(error: yaml.MarkedYAMLError, name: str) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    words = ", ".join(part for part in (error.context, error.problem) if part)
    return ConfigError(f"not valid YAML: {words}", origin=Origin(name, mark.line + 1 if mark else None))


class _Builder:
    """Turns composed nodes into values, noting lines."""

    def __init__(self, loader: _Loader, name: str, origins: dict[KeyPath, Origin]) -> None:
        self.loader = loader
        self.name = name
        self.origins = origins
        self.open_nodes: set[int] = set()

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        origin = Origin(self.name, node.start_mark.line + 1)
        self.origins.setdefault(path, origin)  # a mapping's entry has its key's line already
        if id(node) in self.open_nodes:
            raise ConfigError("an alias that contains itself", key=path, origin=origin)
        self.open_nodes.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
            return self._scalar(node, path)
        finally:
            self.open_nodes.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        self._refuse_duplicates(node, path)
        self.loader.flatten_mapping(node)  # puts what `<<` brings in before the mapping's own entries
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            self.origins[(*path, key)] = Origin(self.name, key_node.start_mark.line + 1)
            values[key] = self.build(value_node, (*path, key))
        return values

    def _refuse_duplicates(self, node: yaml.MappingNode, path: KeyPath) -> None:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError("a key must be a word", key=path, origin=Origin(self.name, line))
            key = key_node.value
            if key in lines:
                reason = f"duplicate key, first given in line {lines[key]}"
                raise ConfigError(reason, key=(*path, key), origin=Origin(self.name, line))
            lines[key] = line

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind == "str":
            return text
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        origin = Origin(self.name, node.start_mark.line + 1)
        try:
            if kind == "int":
                return int(text, 16) if text.startswith("0x") else int(text)
            number = float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text.lower()))
        except ValueError:
            raise ConfigError(f"not a number: {text!r}", key=path, origin=origin) from None
        if kind != "float":
            raise ConfigError(f"unknown YAML tag {node.tag}", key=path, origin=origin)
        if not math.isfinite(number):
            raise ConfigError(f"must be a finite number, got {text}", key=path, origin=origin)
        return number
