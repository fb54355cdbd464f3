"""The tools a client declares and what it says about their use, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeAlias

import msgspec
from msgspec import Meta

from configs.grammars.source import MAX_SOURCE_BYTES
from gateway.api.schema_rules import MAX_DEPTH, is_too_deep, strict_problem
from gateway.errors import BadRequestError, GrammarTooComplexError, UnsupportedError

MAX_TOOLS = 128  # OpenAI's bound
NAME_PATTERN = "^[a-zA-Z0-9_-]{1,64}$"

FunctionName: TypeAlias = Annotated[str, Meta(pattern=NAME_PATTERN)]


class FunctionDefinition(msgspec.Struct, kw_only=True):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    type: str
    function: FunctionDefinition | None = None


class NamedFunction(msgspec.Struct, kw_only=True):
    name: str


class NamedTool(msgspec.Struct, kw_only=True):
    type: str
    function: NamedFunction | None = None


class AllowedTools(msgspec.Struct, kw_only=True):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class ToolChoice(msgspec.Struct, kw_only=True):
    """One function, or some of them."""

    type: str
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


Tools: TypeAlias = Annotated[list[Tool], Meta(max_length=MAX_TOOLS)]
ToolChoiceField: TypeAlias = Literal["none", "auto", "required"] | ToolChoice


class HasTools(Protocol):
    """The fields of a request that are about tools."""

    tools: list[Tool] | None
    tool_choice: ToolChoiceField | None
    parallel_tool_calls: bool | None


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What an answer may call. `shown`: every tool, as templates take them. `callable`: those that may be called.

    `forced`: at least one call, and nothing else, is the answer. `named`: the client chose the very function. `many`:
    more than one call is fine. `strict`: some function's arguments must follow their schema.
    """

    shown: tuple[dict[str, Any], ...]
    callable: tuple[FunctionDefinition, ...]
    forced: bool = False
    named: bool = False
    many: bool = True

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.callable)

    @property
    def strict(self) -> bool:
        return any(function.strict for function in self.callable)

    def schemas(self) -> Mapping[str, dict[str, Any]]:
        """What each function's arguments must be."""
        return {function.name: arguments_schema(function) for function in self.callable}


def arguments_schema(function: FunctionDefinition) -> dict[str, Any]:
    """A function without `parameters` takes none. Arguments are always an object."""
    if not function.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return function.parameters if "type" in function.parameters else {"type": "object", **function.parameters}


def tool_use(fields: HasTools) -> ToolUse | None:
    """None when the answer is to call nothing, whatever tools there are. Raises BadRequestError."""
    if not fields.tools:
        if fields.tools is None and fields.tool_choice not in (None, "none", "auto"):
            raise BadRequestError(
                "Invalid value for 'tool_choice': 'tool_choice' is only allowed when 'tools' are specified.",
                param="tool_choice",
            )
        if fields.tools is not None:
            raise BadRequestError("Invalid value for 'tools': empty array. Leave 'tools' out.", param="tools",
                                  code="invalid_value")  # fmt: skip
        return None
    functions = _functions(fields.tools)
    choice = fields.tool_choice or "auto"
    if choice == "none":
        return None
    shown = tuple(msgspec.to_builtins(_without_nulls(tool)) for tool in fields.tools)
    many = fields.parallel_tool_calls is not False
    if isinstance(choice, str):
        return ToolUse(shown, functions, forced=choice == "required", many=many)
    if choice.type == "allowed_tools" and choice.allowed_tools is not None:
        named = (each.function.name for each in choice.allowed_tools.tools if each.function is not None)
        names = list(dict.fromkeys(named))
        some = tuple(_named(functions, name, "tool_choice.allowed_tools.tools") for name in names)
        if not some:
            raise BadRequestError("Invalid value for 'tool_choice.allowed_tools.tools': there is none.",
                                  param="tool_choice", code="invalid_value")  # fmt: skip
        return ToolUse(shown, some, forced=choice.allowed_tools.mode == "required", many=many)
    if choice.type != "function" or choice.function is None:
        raise BadRequestError(
            "Invalid value for 'tool_choice': expected 'none', 'auto', 'required', or an object with type 'function' "
            "and 'function', or type 'allowed_tools' and 'allowed_tools'.",
            param="tool_choice",
            code="invalid_value",
        )
    one = _named(functions, choice.function.name, "tool_choice")
    return ToolUse(shown, (one,), forced=True, named=True, many=False)


def _functions(tools: Sequence[Tool]) -> tuple[FunctionDefinition, ...]:
    found: dict[str, FunctionDefinition] = {}
    for i, tool in enumerate(tools):
        function = tool.function
        if tool.type != "function":
            raise UnsupportedError(
                f"Invalid value: '{tool.type[:40]}'. This server supports tools of type 'function'.",
                param=f"tools[{i}].type",
            )
        if function is None:
            param = f"tools[{i}].function"
            raise BadRequestError(f"Missing required parameter: '{param}'.", param=param,
                                  code="missing_required_parameter")  # fmt: skip
        if function.name in found:
            raise BadRequestError(f"There are two tools named '{function.name}'.", param=f"tools[{i}].function.name")
        _check(function, i)
        found[function.name] = function
    return tuple(found.values())


def _check(function: FunctionDefinition, index: int) -> None:
    schema = arguments_schema(function)
    problem = None
    if is_too_deep(schema):
        problem = f"it is nested more than {MAX_DEPTH} levels deep."
    elif schema.get("type") != "object":
        problem = f"schema must be a JSON Schema of 'type: \"object\"', got 'type: \"{schema.get('type')}\"'."
    else:
        problem = _form_problem(schema)
    if problem is None and function.strict:
        size = len(msgspec.json.encode(schema))
        if size > MAX_SOURCE_BYTES:  # before anybody reads it further
            raise GrammarTooComplexError(
                f"Invalid schema for function '{function.name}': it has {size} characters, at most {MAX_SOURCE_BYTES} "
                "are allowed.",
                param=f"tools[{index}].function.parameters",
            )
        problem = strict_problem(schema)
    if problem is not None:
        raise BadRequestError(
            f"Invalid schema for function '{function.name}': {problem}",
            param=f"tools[{index}].function.parameters",
            code="invalid_function_parameters",
        )


def _form_problem(schema: Mapping[str, Any]) -> str | None:
    """What readers and grammars rely on."""
    required = schema.get("required", [])
    if not isinstance(schema.get("properties", {}), dict):
        return "'properties' is not of type 'object'."
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return "'required' is not of type 'array' of 'string'."
    return None


def _named(functions: Sequence[FunctionDefinition], name: str, param: str) -> FunctionDefinition:
    for function in functions:
        if function.name == name:
            return function
    raise BadRequestError(f"Invalid value for '{param}': there is no tool '{name[:64]}' in 'tools'.",
                          param="tool_choice", code="invalid_value")  # fmt: skip


def _without_nulls(tool: Tool) -> dict[str, Any]:
    """As OpenAI's clients write a tool, which is what templates have been made for: absent fields are absent."""
    assert tool.function is not None, "_functions has looked"
    function = {name: value for name, value in msgspec.structs.asdict(tool.function).items() if value is not None}
    function.setdefault("parameters", {"type": "object", "properties": {}})
    return {"type": "function", "function": function}
