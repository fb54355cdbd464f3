"""Fields that ask for answers of a certain form: OpenAI's `response_format`, vLLM's `structured_outputs`, and the
`guided_*` that vLLM had before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from configs.grammars.source import MAX_SOURCE_BYTES, GrammarKind, GrammarSource
from gateway.api.schema_rules import MAX_DEPTH, is_too_deep, strict_problem
from gateway.errors import BadRequestError, GrammarTooComplexError, UnsupportedError
from replicas.contract import Constraint

T = TypeVar("T")

Schema: TypeAlias = dict[str, Any]
Choices: TypeAlias = Annotated[list[str], Meta(min_length=1)]
_ANY_OBJECT = '{"type":"object"}'


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema: Schema | None = None
    strict: bool | None = None


class Structure(msgspec.Struct, kw_only=True):
    begin: Annotated[str, Meta(min_length=1)]
    end: str
    schema: Schema


class ResponseFormat(msgspec.Struct, kw_only=True):
    """`structures` and `triggers`: vLLM's structural tags."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[Structure] | None = None
    triggers: list[str] | None = None
    format: Any = None


class StructuredOutputs(msgspec.Struct, kw_only=True):
    json: str | Schema | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None


class StructuredFields(msgspec.Struct, kw_only=True):
    """Of both generating routes."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = None

    def constraint(self) -> Constraint | None:
        """What the answer must match, None when anything goes. Raises BadRequestError."""
        asked = [*_response_format(self.response_format), *_structured(self.structured_outputs), *_guided(self)]
        if len(asked) > 1:
            names = "', '".join(constraint.param for constraint in asked)
            raise BadRequestError(f"'{names}' exclude one another; give one of them.", param=asked[1].param)
        if self.structured_outputs is not None and self.structured_outputs == StructuredOutputs():
            kinds = "json, json_object, regex, choice, grammar or structural_tag"
            raise BadRequestError(f"'structured_outputs' asks for nothing: give {kinds}.", param="structured_outputs")
        return asked[0] if asked else None


def _constraint(param: str, kind: GrammarKind, text: str, whitespace: str | None = None) -> Constraint:
    if whitespace is None:
        return Constraint(source=GrammarSource(kind=kind, text=text), param=param)
    return Constraint(source=GrammarSource(kind=kind, text=text, whitespace=whitespace), param=param)


def _response_format(wanted: ResponseFormat | None) -> Iterator[Constraint]:
    if wanted is None or wanted.type == "text":
        return
    if wanted.type == "json_object":
        yield _constraint("response_format", "json", _ANY_OBJECT)
    elif wanted.type == "structural_tag":
        yield _tags(wanted)
    else:
        described = _present(wanted.json_schema, "response_format.json_schema")
        yield _json_schema(described)


def _json_schema(described: JsonSchemaFormat) -> Constraint:
    schema = described.schema or {}
    text = _schema_json(schema, "response_format")
    if described.strict:
        kind = schema.get("type")
        problem = (
            None if kind == "object" else f"schema must be a JSON Schema of 'type: \"object\"', got 'type: \"{kind}\"'."
        )
        problem = problem or strict_problem(schema)
        if problem is not None:
            raise BadRequestError(f"Invalid schema for response_format '{described.name}': {problem}",
                                  param="response_format")  # fmt: skip
    source = GrammarSource(kind="json", text=text, strict=bool(described.strict))
    return Constraint(source=source, param="response_format")


def _tags(wanted: ResponseFormat) -> Constraint:
    if wanted.format is not None:
        raise UnsupportedError(
            "'response_format' of type 'structural_tag' takes 'structures' and 'triggers' here, not 'format'.",
            param="response_format.format",
        )
    structures = _present(wanted.structures, "response_format.structures")
    for structure in structures:
        _schema_json(structure.schema, "response_format.structures")
    triggers = _present(wanted.triggers, "response_format.triggers")
    tag = {"structures": msgspec.to_builtins(structures), "triggers": triggers}
    return _constraint("response_format", "structural_tag", _text(tag))


def _structured(wanted: StructuredOutputs | None) -> Iterator[Constraint]:
    if wanted is None:
        return
    whitespace = "" if wanted.disable_any_whitespace else wanted.whitespace_pattern
    name = "structured_outputs"
    if wanted.json is not None:
        yield _constraint(f"{name}.json", "json", _schema_text(wanted.json, f"{name}.json"), whitespace)
    if wanted.json_object:
        yield _constraint(f"{name}.json_object", "json", _ANY_OBJECT, whitespace)
    if wanted.regex is not None:
        yield _constraint(f"{name}.regex", "regex", wanted.regex)
    if wanted.choice is not None:
        yield _constraint(f"{name}.choice", "choice", _text(wanted.choice))
    if wanted.grammar is not None:
        yield _constraint(f"{name}.grammar", "grammar", wanted.grammar)
    if wanted.structural_tag is not None:
        yield _tag_text(wanted.structural_tag, f"{name}.structural_tag")


def _tag_text(text: str, param: str) -> Constraint:
    """A structural tag as JSON within a string."""
    try:
        return _tags(msgspec.json.decode(text, type=ResponseFormat))
    except msgspec.MsgspecError as error:
        raise BadRequestError(f"Invalid value for '{param}': {error}.", param=param, code="invalid_value") from None


def _guided(fields: StructuredFields) -> Iterator[Constraint]:
    if fields.guided_json is not None:
        text = _schema_text(fields.guided_json, "guided_json")
        yield _constraint("guided_json", "json", text, fields.guided_whitespace_pattern)
    if fields.guided_regex is not None:
        yield _constraint("guided_regex", "regex", fields.guided_regex)
    if fields.guided_choice is not None:
        yield _constraint("guided_choice", "choice", _text(fields.guided_choice))
    if fields.guided_grammar is not None:
        yield _constraint("guided_grammar", "grammar", fields.guided_grammar)


def _schema_text(schema: str | Schema, param: str) -> str:
    return schema if isinstance(schema, str) else _schema_json(schema, param)


def _schema_json(schema: Schema, param: str) -> str:
    if is_too_deep(schema):
        raise GrammarTooComplexError(
            f"Invalid value for '{param}': it is nested more than {MAX_DEPTH} levels deep.", param=param
        )
    text = _text(schema)
    if len(text) > MAX_SOURCE_BYTES:  # before anybody reads it further
        words = f"it has {len(text)} characters, at most {MAX_SOURCE_BYTES} are allowed"
        raise GrammarTooComplexError(f"Invalid value for '{param}': {words}.", param=param)
    return text


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _present(value: T | None, param: str) -> T:
    if value is None:
        raise BadRequestError(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    return value
