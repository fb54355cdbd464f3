"""OpenAI's published schemas, from the copy that the package llm-comply carries."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

URI = "urn:openai"


def published() -> dict[str, Any]:
    """The schemas by name, as published."""
    spec = json.loads((files("llm_comply") / "specs" / "openai_chat.json").read_text())
    schemas: dict[str, Any] = spec["components"]["schemas"]
    return schemas


@cache
def _registry() -> Registry[Any]:
    spec = {"components": {"schemas": published()}}
    _nullable_as_null(spec)
    return Registry().with_resource(URI, Resource(spec, DRAFT202012))


def _nullable_as_null(node: Any) -> None:
    """OpenAPI 3.0's `nullable: true` in JSON Schema's words."""
    if isinstance(node, list):
        for item in node:
            _nullable_as_null(item)
    elif isinstance(node, dict):
        for item in node.values():
            _nullable_as_null(item)
        if node.get("nullable") is True:
            node.pop("nullable")
            if isinstance(node.get("type"), str):
                node["type"] = [node["type"], "null"]
            elif "$ref" in node:
                node["anyOf"] = [{"$ref": node.pop("$ref")}, {"type": "null"}]
            if "enum" in node:
                node["enum"] = [*node["enum"], None]


def problems(value: Any, schema: str) -> list[str]:
    """What is wrong with a value by one of OpenAI's schemas."""
    validator = Draft202012Validator({"$ref": f"{URI}#/components/schemas/{schema}"}, registry=_registry())
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def completion_chunk_problems(chunk: dict[str, Any]) -> list[str]:
    """What is wrong with a piece of a completion's stream. It has the schema of the whole answer, but OpenAI sends a
    null `finish_reason` until the last, and with `include_usage` a null `usage`."""
    choices = [{**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in chunk["choices"]]
    shown = {**chunk, "choices": choices}
    if "usage" in shown and shown["usage"] is None:
        del shown["usage"]
    return problems(shown, "CreateCompletionResponse")
