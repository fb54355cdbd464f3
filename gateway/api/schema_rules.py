"""What OpenAI demands of a schema that is to be followed strictly: every property required, and no others.

Worded as OpenAI words it, so that a client sees here what it would see there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MAX_DEPTH = 100
"""Levels of JSON. OpenAI allows ten levels of objects, which are twenty of these."""


def is_too_deep(value: object, max_depth: int = MAX_DEPTH) -> bool:
    """Whether JSON is nested deeper than anything that reads it recursively can be trusted with."""
    level: list[object] = [value]
    for _ in range(max_depth):
        inner: list[object] = []
        for each in level:
            if isinstance(each, Mapping):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        if not inner:
            return False
        level = inner
    return True


def strict_problem(schema: object) -> str | None:
    """The first breach of the rules, None when there is none."""
    return next(_problems(schema, ()), None)


def _problems(schema: object, context: tuple[str, ...]) -> Iterator[str]:
    if not isinstance(schema, Mapping):
        if not isinstance(schema, bool):
            yield f"In context={context}, {_short(schema)} is not of type 'object', 'boolean'."
        return
    if schema.get("type") == "object" or "properties" in schema:
        yield from _object_problems(schema, context)
    for key in ("$defs", "definitions", "properties"):
        inner = schema.get(key)
        if isinstance(inner, Mapping):
            for name, part in inner.items():
                yield from _problems(part, (*context, key, str(name)))
    for key in ("anyOf", "allOf", "oneOf", "prefixItems"):
        parts = schema.get(key)
        if isinstance(parts, list):
            for i, part in enumerate(parts):
                yield from _problems(part, (*context, key, str(i)))
    if "items" in schema:
        yield from _problems(schema["items"], (*context, "items"))


def _object_problems(schema: Mapping[str, Any], context: tuple[str, ...]) -> Iterator[str]:
    if schema.get("additionalProperties") is not False:
        yield f"In context={context}, 'additionalProperties' is required to be supplied and to be false."
    properties, required = schema.get("properties", {}), schema.get("required")
    names = properties if isinstance(properties, Mapping) else {}
    if not names and not required:
        return
    needed = required if isinstance(required, list) else []
    known = {name for name in needed if isinstance(name, str)}  # schemas may be long
    missing = [name for name in names if name not in known]
    extra = [name for name in needed if not isinstance(name, str) or name not in names]
    if missing or not isinstance(required, list):
        yield (
            f"In context={context}, 'required' is required to be supplied and to be an array including every key in "
            f"properties. Missing '{missing[0] if missing else ''}'."
        )
    if extra:
        yield (
            f"In context={context}, 'required' is required to be supplied and to be an array including every key in "
            f"properties. Extra required key '{_short(extra[0])}' supplied."
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 64 else text[:64] + "…"
