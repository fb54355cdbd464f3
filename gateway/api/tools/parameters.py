"""What a function's schema says of one of its parameters, for formats that write parameters one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any
from urllib.parse import unquote

import msgspec

from configs.grammars.source import MAX_SOURCE_BYTES
from gateway.errors import BadRequestError, GrammarTooComplexError

_SHARED = ("$defs", "definitions")
_MAX_STEPS = 200
"""Schemas looked at for one parameter: references may lead in circles. Of each as many values."""


def parameter(function: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The schema of one parameter, with all definitions of the function; {} when nothing is said of it."""
    properties = function.get("properties", {})
    described = properties.get(name, {}) if isinstance(properties, Mapping) else {}
    if not isinstance(described, dict):
        return {}
    return {**described, **{key: function[key] for key in _SHARED if key in function}}


def required(function: Mapping[str, Any]) -> frozenset[str]:
    """The parameters that a call must have."""
    names = function.get("required")
    return frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()


def unreadable(function: str, name: str) -> BadRequestError:
    """For a parameter that no call in the model's format can have."""
    return BadRequestError(
        f"Invalid schema for function '{function}': calls of this model cannot have a parameter '{name[:64]}'.",
        param="tools",
        code="invalid_function_parameters",
    )


class ParameterSchemas:
    """The schemas of parameters that a grammar refers to, in all no longer than a grammar may be: each has its own copy
    of the definitions it needs."""

    def __init__(self) -> None:
        self.taken: dict[str, Any] = {}
        self._left = MAX_SOURCE_BYTES

    def take(self, name: str, schema: dict[str, Any]) -> None:
        """`schema`: as `parameter` gives it. Raises GrammarTooComplexError."""
        own = _with_reached(schema)
        self._left -= len(msgspec.json.encode(own))
        if self._left < 0:
            raise GrammarTooComplexError(
                "Invalid value for 'tools': with the definitions that they share, the schemas of their parameters have "
                f"more than {MAX_SOURCE_BYTES} characters.",
                param="tools",
            )
        self.taken[name] = own


def _with_reached(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema with those definitions alone that it refers to, directly or not."""
    own = {key: value for key, value in schema.items() if key not in _SHARED}
    reached: dict[str, dict[str, Any]] = {}
    waiting: list[Any] = [own]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += each
        elif isinstance(each, Mapping):
            waiting += each.values()
            found = _definition(schema, each.get("$ref"))
            if found is not None and found[1] not in reached.get(found[0], {}):
                key, name, definition = found
                reached.setdefault(key, {})[name] = definition
                waiting.append(definition)
    return {**own, **reached}


def _definition(schema: Mapping[str, Any], reference: object) -> tuple[str, str, Any] | None:
    """Where it stands, its name, and what is defined there."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    key, _, path = reference[2:].partition("/")
    name = _plain(path.split("/", 1)[0])
    definitions = schema.get(key) if key in _SHARED else None
    return (key, name, definitions[name]) if isinstance(definitions, Mapping) and name in definitions else None


def _plain(step: str) -> str:
    """A step of a reference (a JSON pointer as URI fragment) without its escapes."""
    return unquote(step).replace("~1", "/").replace("~0", "~")


def kinds(schema: Mapping[str, Any]) -> frozenset[str]:
    """JSON's names of the types that a value may have; of a schema that says nothing, `string`."""
    found: set[str] = set()
    seen: set[int] = set()
    waiting: list[Any] = [schema]
    while waiting and len(seen) < _MAX_STEPS:
        each = waiting.pop()
        if isinstance(each, Mapping) and id(each) not in seen:
            seen.add(id(each))
            found |= set(_named(each))
            waiting += _inner(each, schema)
    return frozenset(found) or frozenset({"string"})


def _named(schema: Mapping[str, Any]) -> Iterator[str]:
    named = schema.get("type")
    if named is not None:
        yield from (kind for kind in (named if isinstance(named, list) else [named]) if isinstance(kind, str))
        return
    values = schema.get("enum")
    if not isinstance(values, list):
        values = [schema["const"]] if "const" in schema else []
    yield from map(_kind_of, islice(values, _MAX_STEPS))
    if "properties" in schema:
        yield "object"
    if "items" in schema:
        yield "array"


def _inner(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Iterator[Any]:
    for key in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(key)
        yield from islice(parts, _MAX_STEPS) if isinstance(parts, list) else ()
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for step in reference[2:].split("/"):
            target = target.get(_plain(step)) if isinstance(target, Mapping) else None
        yield target


def _kind_of(value: object) -> str:
    if value is None:
        return "null"
    for types, kind in ((bool, "boolean"), ((int, float), "number"), (str, "string"), (list, "array")):
        if isinstance(value, types):
            return kind
    return "object"
