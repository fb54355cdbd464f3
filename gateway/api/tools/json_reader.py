"""Reads answers whose tool calls are JSON objects, between markers or bare.

    Let me look. <tool_call>{"name": …, "arguments": {…}}</tool_call>       hermes
    └ text ─────┘└ marker ──┘└ objects, alone, in a list, or one after the other ┘

What turns out not to be a call is text after all, marker included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway.api.pieces import CallArguments, CallBegun, num_held
from gateway.api.tools.json_call import JsonCall
from gateway.api.tools.steps import SteppingReader

_SPACE = " \t\r\n"
_AROUND = _SPACE + "[],;"
"""What may stand around the objects of several calls."""


@dataclass(frozen=True, slots=True)
class JsonMarks:
    """`begin`: any of these comes before calls; none: calls stand at the beginning of the text or nowhere. `end`: comes
    after them, "" when nothing does."""

    begin: tuple[str, ...] = ()
    end: str = ""


class JsonReader(SteppingReader):
    """`names`: the functions there are; a bare object that names none of them is text. `new_id` makes call ids."""

    def __init__(self, marks: JsonMarks, names: frozenset[str], new_id: Callable[[], str]) -> None:
        super().__init__()
        self._marks = marks
        self._names = names
        self._new_id = new_id
        self._call: JsonCall | None = None
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
        found = [(at, mark) for mark in self._marks.begin if (at := self._rest.find(mark)) >= 0]
        if found:
            at, mark = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            before = self._rest[:at].rstrip()
            self._text(before)  # without the white space before a call
            self._raw, self._rest = self._rest[len(before) : at + len(mark)], self._rest[at + len(mark) :]
            self._state = "calls"
            return True
        held = max(num_held(self._rest, mark) for mark in self._marks.begin)
        shown = self._rest[: len(self._rest) - held].rstrip()
        self._text(shown)
        self._rest = self._rest[len(shown) :]
        return False

    def _look_at_beginning(self) -> bool:
        stripped = self._rest.lstrip()
        if not stripped:
            return False
        self._state = "calls" if stripped[0] in "{[" else "plain"
        return True

    def _between_calls(self) -> bool:
        end = self._marks.end
        stripped = self._rest.lstrip(_AROUND)
        if end and not stripped.startswith(end) and end.startswith(stripped):
            return False  # "" or the beginning of the end
        if not end and not stripped:
            return False
        self._raw, self._rest = self._raw + self._rest[: len(self._rest) - len(stripped)], stripped
        if stripped[0] == "{":
            self._call, self._begun, self._state = JsonCall(), False, "call"
            return True
        if end and stripped.startswith(end):
            self._raw, self._rest = self._raw + end, stripped[len(end) :]
        if not self._begun:  # nothing was called
            self._text(self._raw)
        self._leave()
        return True

    def _leave(self) -> None:
        """No call can follow before the next marker."""
        self._raw, self._begun = "", False
        self._state = "text" if self._marks.begin else "plain"

    def _inside_call(self) -> bool:
        call = self._call
        assert call is not None, "begun by _between_calls"
        taken = call.feed(self._rest)
        self._raw += "" if self._begun else self._rest[:taken]
        self._rest = self._rest[taken:]
        if not self._begun and call.name is not None and not call.broken and self._is_known(call.name):
            self._begun, self._raw = True, ""
            self._pieces.append(CallBegun(self._num_calls, self._new_id(), call.name))
            self._num_calls += 1
        if self._begun and (arguments := call.take_arguments()):
            self._pieces.append(CallArguments(self._num_calls - 1, arguments))
        if not (call.closed or call.broken):
            return True  # its name has become known, or nothing is left to read
        if self._begun:
            self._state = "calls"
        else:
            self._text(self._raw)
            self._leave()
        return True

    def _is_known(self, name: str) -> bool:
        return bool(self._marks.begin) or name in self._names
