"""Our bounds beside those of OpenAI's published specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.inspect import FloatType, IntType, StructType, UnionType

from gateway.api.chat import ChatRequest
from gateway.api.completions import CompletionRequest
from tests.gateway.openai_schema import published

DOCUMENTED = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
INT64 = (float(-(2**63)), float(2**63 - 1))  # the specification's own numbers are rounded to doubles

DEVIATIONS: dict[tuple[str, str], tuple[float | None, float | None, str]] = {
    # (schema, field): our minimum, our maximum, why
    ("CreateCompletionRequest", "max_tokens"): (1, 2**31 - 1, "an answer has at least one token"),
    ("CreateChatCompletionRequest", "max_tokens"): (1, 2**31 - 1, "an answer has at least one token"),
    ("CreateChatCompletionRequest", "max_completion_tokens"): (1, 2**31 - 1, "an answer has at least one token"),
}


def specified(schema: str) -> dict[str, tuple[float | None, float | None]]:
    """Minimum and maximum of a request's numeric fields, from the specification."""
    schemas = published()
    bounds: dict[str, tuple[float | None, float | None]] = {}

    def walk(node: dict[str, Any]) -> None:
        if "$ref" in node:
            walk(schemas[node["$ref"].rsplit("/", 1)[1]])
        for part in node.get("allOf", []):
            walk(part)
        for name, field in node.get("properties", {}).items():
            if field.get("type") in ("integer", "number"):
                low, high = INT64 if field.get("format") == "int64" else (None, None)
                bounds[name] = (_double(field.get("minimum", low)), _double(field.get("maximum", high)))

    walk(schemas[schema])
    return bounds


def taken(request: type[msgspec.Struct]) -> dict[str, tuple[float | None, float | None]]:
    """Minimum and maximum of a request's numeric fields, as we decode them."""
    info = msgspec.inspect.type_info(request)
    assert isinstance(info, StructType)
    bounds: dict[str, tuple[float | None, float | None]] = {}
    for field in info.fields:
        kinds = field.type.types if isinstance(field.type, UnionType) else (field.type,)
        for kind in kinds:
            if isinstance(kind, IntType | FloatType):
                assert kind.lt is None
                # An open minimum equals none that the specification knows.
                low = float("nan") if kind.gt is not None else kind.ge
                bounds[field.encode_name] = (_double(low), _double(kind.le))
    return bounds


def _double(bound: float | None) -> float | None:
    return None if bound is None else float(bound)


@pytest.mark.parametrize(
    ("schema", "request_type"),
    [("CreateChatCompletionRequest", ChatRequest), ("CreateCompletionRequest", CompletionRequest)],
)
def test_every_numeric_field_has_the_bounds_of_the_specification(schema: str, request_type: Any) -> None:
    theirs, ours = specified(schema), taken(request_type)
    assert theirs.keys() <= ours.keys(), "a numeric field of the specification is not taken at all"
    assert {"temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty"} <= theirs.keys()
    for name, bounds in theirs.items():
        if (schema, name) in DEVIATIONS:
            *deviation, _ = DEVIATIONS[schema, name]
            assert ours[name] == tuple(deviation) != bounds, f"{name} is no longer the deviation it is said to be"
        else:
            assert ours[name] == bounds, name


def test_every_deviation_is_documented_with_its_reason() -> None:
    unwrapped = " ".join(DOCUMENTED.split())
    for (_, name), (low, _, reason) in DEVIATIONS.items():
        assert f"`{name}` at least {low}" in unwrapped
        assert reason in unwrapped
