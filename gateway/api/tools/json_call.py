"""One tool call written as a JSON object, read character by character so that its arguments can be passed on early.

{"name": "weather", "arguments": {"city": "Paris"}}
           └ known: the call begins      └ passed on as they come
"""

from __future__ import annotations

import json
import re
from typing import Any

NAME_KEYS = ("name", "function")
ARGUMENT_KEYS = ("arguments", "parameters")

_SPACE = " \t\r\n"
_INSIDE = re.compile(r'["{}\[\],]')
_STRING_END = re.compile(r'["\\]')


class JsonText:
    """The extent of a JSON object in a text that comes in pieces, from its `{` on."""

    def __init__(self) -> None:
        self.closed = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    @property
    def begun(self) -> bool:
        """Whether any of it has come."""
        return self._depth > 0

    @property
    def in_string(self) -> bool:
        return self._in_string

    def feed(self, text: str) -> int:
        """How many characters are the object's."""
        for at, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    self.closed = True
                    return at + 1
        return len(text)


class JsonCall:
    """Takes the text from the object's `{` on. `name` is known at some point; `take_arguments` gives what has come.

    `closed`: the object is complete. `broken`: it is not an object, or not a call. Order of the keys does not matter;
    keys that are not ours are passed over. Arguments that were put into a string are taken out of it.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.closed = False
        self.broken = False
        self._key: str | None = None  # of the value being read
        self._expects = "{"  # then: key, colon, value, next
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._passes_on = False
        self._value: list[str] = []  # of the value being read, when it is not passed on
        self._arguments: list[str] = []
        self._has_arguments = False

    def take_arguments(self) -> str:
        """Characters of the arguments that have not been taken yet; `{}` for a complete call without any."""
        if self.closed and not self._has_arguments:
            self._has_arguments = True
            return "{}"
        taken = "".join(self._arguments)
        self._arguments.clear()
        return taken

    def feed(self, text: str) -> int:
        """Reads on, at most to where the name becomes known, so that what is known then does not depend on the pieces;
        returns how many characters were the object's."""
        at, name = 0, self.name
        while at < len(text) and self.name is name and not (self.closed or self.broken):
            if self._depth or self._in_string or self._expects in ("key", "value"):
                at = self._inside(text, at)
            else:
                self._between(text[at])
                at += 1
        return at

    def _between(self, char: str) -> None:
        """White space and the punctuation of the object itself."""
        if char in _SPACE:
            return
        if self._expects == "{" and char == "{":
            self._expects = "first key"
        elif self._expects in ("first key", "another key") and char == '"':
            self._begin("key", char)
            self._in_string = True
        elif self._expects == "colon" and char == ":":
            self._expects = "value start"
        elif self._expects == "value start" and char not in ",:}]":
            self._begin("value", char)
            self._in_string = char == '"'
            self._depth = 1 if char in "{[" else 0
        elif self._expects == "next" and char == ",":
            self._expects = "another key"
        elif self._expects in ("next", "first key") and char == "}":
            self.closed = True
        else:
            self.broken = True

    def _begin(self, what: str, char: str) -> None:
        self._expects = what
        self._escaped = False
        self._value.clear()
        self._passes_on = what == "value" and self._key in ARGUMENT_KEYS and char == "{"
        self._keep(char)

    def _keep(self, text: str) -> None:
        (self._arguments if self._passes_on else self._value).append(text)

    def _inside(self, text: str, at: int) -> int:
        """Within a key or a value: on to the next character that matters; returns where reading goes on."""
        if self._in_string:
            return self._in_quotes(text, at)
        found = _INSIDE.search(text, at)
        if found is None:
            self._keep(text[at:])
            return len(text)
        end, char = found.start(), found.group()
        if not self._depth and char in ",}]":  # a number, true, false or null ends before it
            self._keep(text[at:end])
            self._end()
            return end
        self._keep(text[at : end + 1])
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if not self._depth:
                self._end()
        return end + 1

    def _in_quotes(self, text: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            self._keep(text[at])
            return at + 1
        found = _STRING_END.search(text, at)
        if found is None:
            self._keep(text[at:])
            return len(text)
        end = found.end()
        self._keep(text[at:end])
        if found.group() == "\\":
            self._escaped = True
            return end
        self._in_string = False
        if not self._depth:
            self._end()
        return end

    def _end(self) -> None:
        """A key or a value is complete."""
        if self._expects == "key":
            key = _parsed("".join(self._value))
            self._key = key if isinstance(key, str) else None
            self._expects = "colon"
            return
        self._expects = "next"
        if self._passes_on:
            self._has_arguments = True
        elif self._key in NAME_KEYS:
            name = _parsed("".join(self._value))
            self.broken = not (isinstance(name, str) and name)
            self.name = name if isinstance(name, str) else None
        elif self._key in ARGUMENT_KEYS:
            self._unpack(_parsed("".join(self._value)))

    def _unpack(self, value: Any) -> None:
        """Arguments that are no object: in a string, or null."""
        if isinstance(value, str) and isinstance(_parsed(value), dict):
            self._has_arguments = True
            self._arguments.append(value)
        elif value not in (None, ""):
            self.broken = True


def _parsed(text: str) -> Any:
    """The JSON value, None when it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None
