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


@cache
def _registry() -> Registry[Any]:
    spec = json.loads((files("llm_comply") / "specs" / "openai_chat.json").read_text())
    _nullable_as_null(spec["components"]["schemas"])
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
            if "enum" in node:
                node["enum"] = [*node["enum"], None]


def problems(value: Any, schema: str) -> list[str]:
    """What is wrong with a value by one of OpenAI's schemas."""
    validator = Draft202012Validator({"$ref": f"{URI}#/components/schemas/{schema}"}, registry=_registry())
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]
