"""Calls as Python writes them, in a list: Llama 3.2 and 4, Olmo 3, LFM2.

[weather(city="Paris", days=3), now()]                    bare: the whole answer, or nothing of it
<|python_start|>[now()]<|python_end|>                     between markers
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from configs.grammars.source import literal
from gateway.api.pieces import CallArguments, CallBegun, Reader, num_held
from gateway.api.tools.declared import ToolUse
from gateway.api.tools.format import CallRules, Spell, any_of, lead_rule, openai_id
from gateway.api.tools.json_reader import JsonMarks
from gateway.api.tools.parameters import ParameterSchemas, parameter, required, unreadable
from gateway.api.tools.python_call import can_be_named, read_arguments
from gateway.api.tools.steps import SteppingReader

_CALL = re.compile(r"([\w-][\w.-]{0,63})\(")
_CALL_SO_FAR = re.compile(r"([\w-][\w.-]{0,63})?")
_AROUND = " \t\r\n[],"


class PythonicReader(SteppingReader):
    """`names`: the functions there are; what calls none of them is text. A call is told when it is complete: what its
    values are is known only then."""

    def __init__(self, marks: JsonMarks, names: frozenset[str], new_id: Callable[[], str]) -> None:
        super().__init__()
        self._marks = marks
        self._names = names
        self._new_id = new_id
        self._scanned = 0  # of the call being read
        self._quote = ""
        self._depth = 0
        self._state = "text" if marks.begin else "first"

    def _step(self) -> bool:
        return {
            "text": self._find_marker,
            "first": self._look_at_beginning,
            "calls": self._between_calls,
            "call": self._inside_call,
            "plain": self._pass_on,
        }[self._state]()

    def _find_marker(self) -> bool:
        mark = self._marks.begin[0]
        at = self._rest.find(mark)
        end = at if at >= 0 else len(self._rest) - num_held(self._rest, mark)
        shown = self._rest[:end].rstrip()  # without the white space before a call
        self._text(shown)
        self._rest = self._rest[len(shown) :]
        if at < 0:
            return False
        found = self._rest.index(mark) + len(mark)
        self._raw, self._rest, self._state = self._rest[:found], self._rest[found:], "calls"
        return True

    def _look_at_beginning(self) -> bool:
        stripped = self._rest.lstrip()
        if not stripped:
            return False
        self._state = "calls" if stripped[0] == "[" else "plain"
        return True

    def _between_calls(self) -> bool:
        end, stripped = self._marks.end, self._rest.lstrip(_AROUND)
        if not stripped or (end and stripped != end and end.startswith(stripped)):
            return False
        begins = _CALL.match(stripped)
        if begins is None and _CALL_SO_FAR.fullmatch(stripped):
            return False
        self._raw, self._rest = self._raw + self._rest[: len(self._rest) - len(stripped)], stripped
        if begins is not None and begins[1] in self._names:
            self._scanned, self._depth, self._quote, self._state = begins.end(), 1, "", "call"
            return True
        if end and stripped.startswith(end):
            self._raw, self._rest = self._raw + end, stripped[len(end) :]
        self._leave()
        return True

    def _leave(self) -> None:
        """No call can follow before the next marker."""
        self._text("" if self._begun else self._raw)
        self._raw, self._begun = "", False
        self._state = "text" if self._marks.begin else "plain"

    def _inside_call(self) -> bool:
        if not self._closes():
            return False
        begins = _CALL.match(self._rest)
        assert begins is not None, "seen by _between_calls"
        arguments = read_arguments(self._rest[begins.end() : self._scanned - 1])
        if arguments is None:
            self._raw, self._rest = self._raw + self._rest[: self._scanned], self._rest[self._scanned :]
            self._begun = False
            self._leave()
            return True
        text = json.dumps(arguments, ensure_ascii=False)
        self._pieces += [CallBegun(self._num_calls, self._new_id(), begins[1]), CallArguments(self._num_calls, text)]
        self._num_calls += 1
        self._raw, self._begun, self._state = "", True, "calls"
        self._rest = self._rest[self._scanned :]
        return True

    def _closes(self) -> bool:
        """Reads on to the call's closing parenthesis; whether it has come."""
        text, at = self._rest, self._scanned
        while at < len(text) and self._depth:
            char = text[at]
            if self._quote:
                if char == "\\":
                    if at + 1 == len(text):
                        break
                    at += 1
                elif char == self._quote:
                    self._quote = ""
            elif char in "\"'":
                self._quote = char
            elif char in "([{":
                self._depth += 1
            elif char in ")]}":
                self._depth -= 1
            at += 1
        self._scanned = at
        return not self._depth


@dataclass(frozen=True, slots=True)
class PythonicFormat:
    """`opening`, `closing`: around the calls, within the markers; `between`: between two of them."""

    marks: JsonMarks = field(default_factory=JsonMarks)
    opening: str = "["
    closing: str = "]"
    between: str = ", "

    @property
    def markers(self) -> tuple[str, ...]:
        return (*self.marks.begin, *filter(None, [self.marks.end]))

    def reader(self, use: ToolUse, new_id: Callable[[], str]) -> Reader:
        return PythonicReader(self.marks, use.names, new_id)

    def call_id(self, random: Random) -> str:
        return openai_id(random)

    def spelled(self, calls: Sequence[tuple[str, Any]]) -> str:
        written = self.between.join(
            f"{name}({', '.join(f'{key}={json.dumps(value, ensure_ascii=False)}' for key, value in arguments.items())})"
            for name, arguments in calls
        )
        begin = self.marks.begin[0] if self.marks.begin else ""
        return f"{begin}{self.opening}{written}{self.closing}{self.marks.end}"

    def rules(self, use: ToolUse, spell: Spell) -> CallRules:
        """Values are JSON: the reader takes `true` for True."""
        names = [f"call_{i}" for i in range(len(use.callable))]
        rules: list[str] = []
        schemas = ParameterSchemas()
        for name, function, schema in zip(names, use.callable, use.schemas().values(), strict=True):
            described = schema.get("properties", {})
            needed = required(schema)
            ordered = sorted(described, key=lambda key: key not in needed)
            parts = ""
            for j, key in reversed(list(enumerate(ordered))):  # each optional one needs those before it
                if not can_be_named(key):
                    raise unreadable(function.name, key)
                schemas.take(f"{name}_{j}_schema", parameter(schema, key))
                comma = '", " ' if j else ""
                part = f"{comma}{literal(key + '=')} @{name}_{j}_schema {parts}"
                parts = part if key in needed else f"({part})?"
            rules.append(f'{name}: {literal(function.name + "(")} {parts} ")"')
        more = f"({literal(self.between)} call)*" if use.many else ""
        rules.append(f"call: {any_of(names)}")
        opening, closing = (literal(text) if text else "" for text in (self.opening, self.closing))
        inner = f"{opening} call {more} {closing}"
        if not self.marks.begin:
            return CallRules((*rules, f"calls: {inner}"), schemas.taken, has_lead=False)
        begin, end = spell(self.marks.begin[0]), spell(self.marks.end)
        rules += [f"rest: {inner} {end}", f"calls: {begin} rest", lead_rule(begin)]
        return CallRules(tuple(rules), schemas.taken)


PYTHONIC = PythonicFormat()
LLAMA4_PYTHONIC = PythonicFormat(JsonMarks(("<|python_start|>",), "<|python_end|>"))
LFM2 = PythonicFormat(JsonMarks(("<|tool_call_start|>",), "<|tool_call_end|>"))
OLMO3 = PythonicFormat(JsonMarks(("<function_calls>",), "</function_calls>"), opening="\n", closing="\n", between="\n")
