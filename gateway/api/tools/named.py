"""Calls with their name in front of the arguments, a section of them between markers: DeepSeek's and Kimi's.

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜>…
└ section ───────────┘└ call ───────────┘└ opening ─────────┘└ arguments ───┘└ end of the call ┘
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

from configs.grammars.source import literal
from gateway.api.pieces import CallArguments, CallBegun, Reader, num_held
from gateway.api.tools.declared import ToolUse
from gateway.api.tools.format import MAX_OPENING_CHARS, CallRules, Spell, any_of, lead_rule, openai_id
from gateway.api.tools.json_call import JsonText
from gateway.api.tools.steps import SteppingReader

_PARTS = re.compile(r"(\{name\}|\{index\}|<[^>]*>)")
_PATTERNS = {"{name}": r"(?P<name>[A-Za-z0-9_.-]{1,64})", "{index}": r"(?P<index>[0-9]{1,6})"}
_SPACE = r"\s{0,8}"


@dataclass(frozen=True)
class NamedMarks:
    """`opening`: what stands between `call` and the arguments, with `{name}`, perhaps `{index}` (which counts the calls
    of the conversation), and markers in angle brackets; `closing`: after the arguments, before `call_end`."""

    begin: str
    end: str
    call: str
    call_end: str
    opening: str
    closing: str = ""
    between: str = ""

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Of the opening: texts, markers, `{name}`, `{index}`."""
        return tuple(filter(None, _PARTS.split(self.opening)))

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """An opening, as models write it, up to the arguments. Bounded: see MAX_OPENING_CHARS."""
        words = (_PATTERNS.get(part) or _SPACE.join(map(re.escape, part.split())) for part in self.parts)
        return re.compile(_SPACE + _SPACE.join(words) + _SPACE + r"(?=\{)")


class NamedReader(SteppingReader):
    """`new_id` makes call ids, where the model writes none."""

    def __init__(self, marks: NamedMarks, new_id: Callable[[], str]) -> None:
        super().__init__()
        self._marks = marks
        self._new_id = new_id
        self._arguments = JsonText()
        self._state = "text"

    def _step(self) -> bool:
        return {
            "text": self._find_marker,
            "section": self._between_calls,
            "opening": self._open,
            "arguments": self._pass_arguments,
            "closing": self._close,
        }[self._state]()

    def _find_marker(self) -> bool:
        marks = (self._marks.begin, self._marks.call)
        at = min((found for mark in marks if (found := self._rest.find(mark)) >= 0), default=-1)
        if at >= 0:
            before = self._rest[:at].rstrip()
            self._text(before)  # without the white space before a call
            self._raw, self._rest = self._rest[len(before) : at], self._rest[at:]
            if self._rest.startswith(self._marks.begin):
                self._take_marker(self._marks.begin)
            self._state = "section"
            return True
        held = max(num_held(self._rest, mark) for mark in marks)
        shown = self._rest[: len(self._rest) - held].rstrip()
        self._text(shown)
        self._rest = self._rest[len(shown) :]
        return False

    def _between_calls(self) -> bool:
        marks, stripped = self._marks, self._rest.lstrip()
        if any(mark != stripped and mark.startswith(stripped) for mark in (marks.call, marks.end)):
            return False
        self._raw, self._rest = self._raw + self._rest[: len(self._rest) - len(stripped)], stripped
        if stripped.startswith(marks.call):
            self._take_marker(marks.call)
            self._state = "opening"
            return True
        if stripped.startswith(marks.end):
            self._take_marker(marks.end)
        self._leave()
        return True

    def _take_marker(self, mark: str) -> None:
        self._raw, self._rest = self._raw + mark, self._rest[len(mark) :]

    def _leave(self) -> None:
        """No call can follow before the next marker."""
        self._text("" if self._begun else self._raw)
        self._raw, self._begun, self._state = "", False, "text"

    def _open(self) -> bool:
        opening = self._marks.pattern.match(self._rest)
        if opening is None:
            if len(self._rest) < MAX_OPENING_CHARS and self._marks.call_end not in self._rest:
                return False
            self._begun = False  # what is no call is text, its marker too
            self._leave()
            return True
        name = opening["name"]
        call_id = f"functions.{name}:{opening['index']}" if "{index}" in self._marks.parts else self._new_id()
        self._pieces.append(CallBegun(self._num_calls, call_id, name))
        self._num_calls += 1
        self._raw, self._rest = "", self._rest[opening.end() :]
        self._arguments, self._begun, self._state = JsonText(), True, "arguments"
        return True

    def _pass_arguments(self) -> bool:
        taken = self._arguments.feed(self._rest)
        self._pieces.append(CallArguments(self._num_calls - 1, self._rest[:taken]))
        self._rest = self._rest[taken:]
        if self._arguments.closed:
            self._state = "closing"
        return bool(self._rest)

    def _close(self) -> bool:
        stripped = self._rest.lstrip("` \t\r\n")
        end = self._marks.call_end
        if end != stripped and end.startswith(stripped):
            return False
        self._rest, self._state = stripped.removeprefix(end), "section"
        return True


@dataclass(frozen=True, slots=True)
class NamedFormat:
    """Calls with their name in front."""

    marks: NamedMarks

    @property
    def markers(self) -> tuple[str, ...]:
        marks = self.marks
        return (marks.begin, marks.end, marks.call, marks.call_end, *(p for p in marks.parts if p.startswith("<")))

    def reader(self, use: ToolUse, new_id: Callable[[], str]) -> Reader:
        return NamedReader(self.marks, new_id)

    def call_id(self, random: Random) -> str:
        return openai_id(random)

    def spelled(self, calls: Sequence[tuple[str, Any]]) -> str:
        marks = self.marks
        written = [
            marks.call
            + marks.opening.replace("{index}", str(index)).replace("{name}", name)
            + json.dumps(arguments, ensure_ascii=False)
            + marks.closing
            + marks.call_end
            for index, (name, arguments) in enumerate(calls)
        ]
        return marks.begin + marks.between.join(written) + marks.end

    def rules(self, use: ToolUse, spell: Spell) -> CallRules:
        marks = self.marks
        names = [f"call_{i}" for i in range(len(use.callable))]
        closing = literal(marks.closing) if marks.closing else ""
        call_end, between = spell(marks.call_end), literal(marks.between) if marks.between else ""
        rules = []
        for name, function in zip(names, use.callable, strict=True):
            opening = " ".join(_spelled_part(part, function.name, spell) for part in marks.parts)
            rules.append(f"{name}: {spell(marks.call)} {opening} @{name}_schema {closing} {call_end}")
        more = f"({between} call)*" if use.many else ""
        begin = spell(marks.begin)
        rules += [f"call: {any_of(names)}", f"rest: call {more} {spell(marks.end)}", f"calls: {begin} rest",
                  lead_rule(begin)]  # fmt: skip
        schemas = dict(zip((f"{name}_schema" for name in names), use.schemas().values(), strict=True))
        return CallRules(tuple(rules), schemas)


def _spelled_part(part: str, name: str, spell: Spell) -> str:
    if part == "{index}":
        return "/[0-9]{1,3}/"
    return spell(part) if part.startswith("<") else literal(part.replace("{name}", name))


_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")

DEEPSEEK_V3 = NamedFormat(
    NamedMarks(*_DEEPSEEK, "function<｜tool▁sep｜>{name}\n```json\n", closing="\n```", between="\n")
)
DEEPSEEK_V31 = NamedFormat(NamedMarks(*_DEEPSEEK, "{name}<｜tool▁sep｜>"))
KIMI_K2 = NamedFormat(
    NamedMarks(
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        "functions.{name}:{index}<|tool_call_argument_begin|>",
    )
)
"""Its templates take back the ids that it wrote: `functions.weather:0`."""
