"""Mistral's calls: a JSON list behind one marker, or since its tokenizer v11 a marker, the name and the arguments each.

[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}}]
[TOOL_CALLS]weather{"city": "Paris"}[TOOL_CALLS]time[CALL_ID]x7[ARGS]{"zone": "CET"}
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from configs.grammars.source import literal
from gateway.api.pieces import CallArguments, CallBegun, Reader
from gateway.api.tools.declared import ToolUse
from gateway.api.tools.format import MAX_OPENING_CHARS, CallRules, Spell, any_of, lead_rule
from gateway.api.tools.json_call import JsonText
from gateway.api.tools.json_format import JsonFormat
from gateway.api.tools.json_reader import JsonMarks, JsonReader

MARKER = "[TOOL_CALLS]"
_NAME = re.compile(r"\s*([A-Za-z0-9_.-]+)\s*(?:\[CALL_ID\][A-Za-z0-9_-]*)?(?:\[ARGS\])?\s*(?=\{)")
_NAME_SO_FAR = re.compile(r"\s*[A-Za-z0-9_.-]*\s*(\[[A-Z_]*(\][A-Za-z0-9_-]*)?){0,2}\s*")


class MistralReader(JsonReader):
    """Reads both kinds."""

    def __init__(self, names: frozenset[str], new_id: Callable[[], str]) -> None:
        super().__init__(JsonMarks((MARKER,)), names, new_id)
        self._text_of_arguments: JsonText | None = None

    def _between_calls(self) -> bool:
        if self._text_of_arguments is not None:
            return self._inside_arguments()
        stripped = self._rest.lstrip()
        if self._begun or not stripped or stripped[0] in "[{":
            return super()._between_calls()
        named = _NAME.match(self._rest, 0, MAX_OPENING_CHARS)
        if named is None:
            if len(self._rest) < MAX_OPENING_CHARS and _NAME_SO_FAR.fullmatch(self._rest):
                return False
            return super()._between_calls()  # neither: text
        self._pieces.append(CallBegun(self._num_calls, self._new_id(), named[1]))
        self._num_calls += 1
        self._raw, self._rest = "", self._rest[named.end() :]
        self._begun, self._text_of_arguments = True, JsonText()
        return True

    def _inside_arguments(self) -> bool:
        arguments = self._text_of_arguments
        assert arguments is not None, "begun by _between_calls"
        taken = arguments.feed(self._rest)
        if taken:
            self._pieces.append(CallArguments(self._num_calls - 1, self._rest[:taken]))
        self._rest = self._rest[taken:]
        if arguments.closed:
            self._text_of_arguments = None
            self._leave()
        return bool(self._rest)


_LIST = JsonFormat(JsonMarks((MARKER,)), listed=True, pad="")


@dataclass(frozen=True, slots=True)
class MistralFormat:
    """`args_marker`: what stands between name and arguments since tokenizer v13; `listed` before v11."""

    listed: bool = True
    args_marker: str = ""

    @property
    def markers(self) -> tuple[str, ...]:
        return (MARKER, *filter(None, [self.args_marker]))

    def reader(self, use: ToolUse, new_id: Callable[[], str]) -> Reader:
        return MistralReader(use.names, new_id)

    def call_id(self, random: Random) -> str:
        """Nine letters and digits: its templates refuse others."""
        return "".join(random.choices(string.ascii_letters + string.digits, k=9))

    def spelled(self, calls: Sequence[tuple[str, Any]]) -> str:
        if self.listed:
            return _LIST.spelled(calls)
        return "".join(f"{MARKER}{name}{self.args_marker}{json.dumps(arguments, ensure_ascii=False)}"
                       for name, arguments in calls)  # fmt: skip

    def rules(self, use: ToolUse, spell: Spell) -> CallRules:
        if self.listed:
            return _LIST.rules(use, spell)
        begin = spell(MARKER)
        names = [f"call_{i}" for i in range(len(use.callable))]
        args = spell(self.args_marker) if self.args_marker else ""
        rules = [f"{name}: {literal(function.name)} {args} @{name}_schema"
                 for name, function in zip(names, use.callable, strict=True)]  # fmt: skip
        again = f"({begin} rest)*" if use.many else ""
        rules += [f"rest: {any_of(names)}", f"calls: {begin} rest {again}", lead_rule(begin)]
        schemas = dict(zip((f"{name}_schema" for name in names), use.schemas().values(), strict=True))
        return CallRules(tuple(rules), schemas)
