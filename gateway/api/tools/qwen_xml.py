"""Calls of Qwen3-Coder and its successors: a tag for each parameter, its value as plain text.

    <tool_call>
    <function=weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

What a value means (text, number, list) is in the function's schema; arguments are passed on parameter by parameter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from configs.grammars.source import literal
from gateway.api.pieces import CallArguments, CallBegun, Content, Piece, Reader, num_held
from gateway.api.tools.declared import ToolUse
from gateway.api.tools.format import MAX_OPENING_CHARS, TEXT, CallRules, Spell, any_of, lead_rule, openai_id
from gateway.api.tools.parameters import ParameterSchemas, kinds, parameter, required, unreadable

BLOCK = "<tool_call>"
CLOSING = "</tool_call>"


@dataclass(frozen=True, slots=True)
class XmlSyntax:
    """`begins`: where calls begin; `function`: after that, up to its parameters, and `may_open` whether text (without
    leading white space) may become it. `name`, `name_end`: around a parameter's name; `value`, `value_end`: around its
    value, the former "" where it follows the name at once; `end`: after the last parameter. With `known_only` what
    names none of the functions is text."""

    begins: tuple[str, ...]
    function: re.Pattern[str]
    may_open: Callable[[str], bool]
    name: str
    name_end: str
    value: str
    value_end: str
    end: str
    known_only: bool = False


def _may_open(text: str) -> bool:
    return "<function=".startswith(text) or (text.startswith("<function=") and ">" not in text)


_SYNTAX = XmlSyntax(
    begins=(BLOCK, "<function="),
    function=re.compile(r"\s*<function=([^>\s]+)>"),
    may_open=_may_open,
    name="<parameter=",
    name_end=">",
    value="",
    value_end="</parameter>",
    end="</function>",
)


class QwenXmlReader:
    """`parameters`: the schema of each function's parameters."""

    def __init__(
        self,
        parameters: Mapping[str, Mapping[str, Any]],
        new_id: Callable[[], str],
        syntax: XmlSyntax = _SYNTAX,
    ) -> None:
        self._syntax = syntax
        self._parameters = parameters
        self._new_id = new_id
        self._rest = ""
        self._num_calls = 0
        self._name: str | None = None  # of the call being read
        self._num_parameters = 0
        self._parameter = ""  # whose value is being read
        self._part = "next"  # of the call: next, name, between, value, or broken
        self._scanned = 0  # characters that no mark begins in
        self._closing = False  # a call has ended, its block perhaps not
        self._pieces: list[Piece] = []

    def feed(self, text: str) -> list[Piece]:
        self._rest += text
        while self._rest and (self._outside() if self._name is None else self._inside()):
            pass
        taken, self._pieces = self._pieces, []
        return taken

    def finish(self) -> list[Piece]:
        """A call that breaks off is told as far as it came."""
        rest, self._rest = self._rest, ""
        said_nothing = self._name is not None or self._closing or (self._num_calls and not rest.strip())
        return [] if said_nothing or not rest else [Content(rest)]

    def _outside(self) -> bool:
        if self._closing:
            stripped = self._rest.lstrip()
            if len(stripped) < len(CLOSING) and CLOSING.startswith(stripped):
                return False
            self._closing = False
            if stripped.startswith(CLOSING):
                self._rest = stripped.removeprefix(CLOSING)
                return True
        at = min((found for mark in self._syntax.begins if (found := self._rest.find(mark)) >= 0), default=-1)
        if at < 0:
            held = max(num_held(self._rest, mark) for mark in self._syntax.begins)
            shown = self._rest[: len(self._rest) - held].rstrip()
            self._text(shown)
            self._rest = self._rest[len(shown) :]
            return False
        before = self._rest[:at].rstrip()
        self._text(before)
        self._rest = self._rest[len(before) :]
        inner = self._rest.lstrip().removeprefix(BLOCK)
        begun = self._syntax.function.match(inner, 0, MAX_OPENING_CHARS)
        if begun is None or (self._syntax.known_only and begun[1] not in self._parameters):
            if begun is None and len(inner) < MAX_OPENING_CHARS and self._syntax.may_open(inner.lstrip()):
                return False
            no_call = len(self._rest) - len(inner) or len(self._syntax.begins[-1])  # a marker that begins no call
            self._text(self._rest[:no_call])
            self._rest = self._rest[no_call:]
            return True
        self._name, self._rest, self._num_parameters = begun[1], inner[begun.end() :], 0
        self._part, self._scanned = "next", 0
        self._pieces += [CallBegun(self._num_calls, self._new_id(), begun[1]), CallArguments(self._num_calls, "{")]
        return True

    def _inside(self) -> bool:
        """Reads on by one part of a call; nothing is searched twice, however small the pieces."""
        if self._part == "next":
            return self._look_at_next()
        if self._part == "name":
            name = self._up_to(self._syntax.name_end)
            if name is None:
                return False
            self._parameter, self._part = name, "between" if self._syntax.value else "value"
            return True
        if self._part == "between":
            if self._take(self._syntax.value):
                self._part = "value"
            return self._goes_on(self._syntax.value)
        if self._part == "value":
            return self._take_value()
        self._rest = ""  # nothing that could be read can follow
        return False

    def _look_at_next(self) -> bool:
        """After the name of the function, or a parameter: another one, or the end."""
        if self._take(self._syntax.name):
            self._part = "name"
        elif self._take(self._syntax.end):
            self._arguments("}")
            self._name, self._closing = None, self._syntax.end != CLOSING
            self._num_calls += 1
            return True
        return self._goes_on(self._syntax.name, self._syntax.end)

    def _take_value(self) -> bool:
        text = self._up_to(self._syntax.value_end)
        if text is None:
            return False
        assert self._name is not None, "a call is being read"
        between = ", " if self._num_parameters else ""
        value = self._value(self._name, self._parameter, text.removeprefix("\n").removesuffix("\n"))
        self._arguments(f"{between}{json.dumps(self._parameter)}: {json.dumps(value, ensure_ascii=False)}")
        self._num_parameters += 1
        self._part = "next"
        return True

    def _take(self, mark: str) -> bool:
        """Passes a mark, and white space before it."""
        self._rest = self._rest.lstrip()
        if not self._rest.startswith(mark):
            return False
        self._rest = self._rest[len(mark) :]
        return True

    def _goes_on(self, *marks: str) -> bool:
        """Where a mark was wanted: False when it needs more text. Without the mark the call is broken."""
        if self._part not in ("next", "between"):
            return True
        if any(mark.startswith(self._rest) for mark in marks):
            return False
        self._part = "broken"
        return True

    def _up_to(self, mark: str) -> str | None:
        """Takes the text before a mark, and the mark."""
        at = self._rest.find(mark, self._scanned)
        if at < 0:
            self._scanned = max(0, len(self._rest) - len(mark) + 1)
            return None
        before, self._rest, self._scanned = self._rest[:at], self._rest[at + len(mark) :], 0
        return before

    def _text(self, text: str) -> None:
        if text:
            self._pieces.append(Content(text))

    def _arguments(self, text: str) -> None:
        self._pieces.append(CallArguments(self._num_calls, text))

    def _value(self, function: str, name: str, text: str) -> Any:
        """The value as its schema means it; text where the schema does not say, or the text is no such value."""
        possible = kinds(parameter(self._parameters.get(function, {}), name))
        if "string" in possible and not (text == "null" and "null" in possible):
            return text
        try:
            return json.loads(text)
        except ValueError:
            return {"True": True, "False": False, "None": None}.get(text.strip(), text)


@dataclass(frozen=True, slots=True)
class QwenXmlFormat:
    """Qwen3-Coder's tags."""

    @property
    def markers(self) -> tuple[str, ...]:
        return ("<tool_call>", "</tool_call>")

    def reader(self, use: ToolUse, new_id: Callable[[], str]) -> Reader:
        return QwenXmlReader(use.schemas(), new_id)

    def call_id(self, random: Random) -> str:
        return openai_id(random)

    def spelled(self, calls: Sequence[tuple[str, Any]]) -> str:
        return "\n".join(
            f"<tool_call>\n<function={name}>\n"
            + "".join(f"<parameter={key}>\n{plain(value)}\n</parameter>\n" for key, value in arguments.items())
            + "</function>\n</tool_call>"
            for name, arguments in calls
        )

    def rules(self, use: ToolUse, spell: Spell) -> CallRules:
        names = [f"call_{i}" for i in range(len(use.callable))]
        rules: list[str] = []
        schemas = ParameterSchemas()
        for name, function, schema in zip(names, use.callable, use.schemas().values(), strict=True):
            parts, needed = [], required(schema)
            for j, key in enumerate(schema.get("properties", {})):
                if _SYNTAX.name_end in key:
                    raise unreadable(function.name, key)
                rule = f"{name}_{j}"
                parts.append(rule if key in needed else f"{rule}?")
                rules.append(f"{rule}: {literal(f'<parameter={key}>' + chr(10))} {rule}_value")
                rules.append(value_rule(rule, parameter(schema, key), schemas))
            rules.append(f"{name}: {literal(f'<function={function.name}>' + chr(10))} {' '.join(parts)}")
        begin, end = spell("<tool_call>"), spell("</tool_call>")
        again = f'("\\n" {begin} rest)*' if use.many else ""
        rules += [
            f'rest: "\\n" ({any_of(names)}) "</function>\\n" {end}',
            f"calls: {begin} rest {again}",
            lead_rule(begin),
        ]
        return CallRules(tuple(rules), schemas.taken)


def value_rule(
    rule: str, schema: dict[str, Any], schemas: ParameterSchemas, closing_tag: str = "\n</parameter>\n"
) -> str:
    """A parameter's value: text to the closing tag, or JSON."""
    closing, texts = literal(closing_tag), schema.get("enum")
    if "string" not in kinds(schema):
        schemas.take(f"{rule}_schema", schema)
        return f"{rule}_value: @{rule}_schema {closing}"
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return f"{rule}_value: ({' | '.join(map(literal, texts))}) {closing}"
    return f"{rule}_value[lazy]: {TEXT} {closing}"


def plain(value: Any) -> str:
    """A value as it stands between its tags."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
