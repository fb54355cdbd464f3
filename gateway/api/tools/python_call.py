"""Arguments written as Python writes them: `city="Paris", days=[1, 2], now=True`.

Read here rather than by Python's own parser, which text from a model can bring down.
"""

from __future__ import annotations

import re
from typing import Any

MAX_DEPTH = 32

_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[^\W\d]\w*")
_NAME = re.compile(r"[^\s=,()\[\]{}\"']+")  # also of parameters that Python could not have, such as `$id`
_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])")
_STRING = re.compile(r"\"((?:[^\"\\]|\\.)*)\"|'((?:[^'\\]|\\.)*)'", re.DOTALL)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
_WORDS: dict[str, Any] = {
    "True": True, "true": True, "False": False, "false": False, "None": None, "null": None,
}  # fmt: skip


def read_arguments(text: str) -> dict[str, Any] | None:
    """What stands between the parentheses of a call by keywords; None when it is nothing of the kind."""
    try:
        return _Text(text).arguments()
    except ValueError:
        return None


def can_be_named(name: str) -> bool:
    """Whether an argument of this name is read as it is written."""
    return _NAME.fullmatch(name) is not None


class _Text:
    """A text being read. Raises ValueError."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def arguments(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._ends():
            name = self._one(_NAME)
            self._expect("=")
            found[name] = self._value(0)
            if not self._ends():
                self._expect(",")
        return found

    def _ends(self) -> bool:
        self._skip()
        return self._at == len(self._text)

    def _skip(self) -> None:
        space = _SPACE.match(self._text, self._at)
        assert space is not None, "it matches the empty text"
        self._at = space.end()

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        self._skip()
        found = pattern.match(self._text, self._at)
        if found is not None:
            self._at = found.end()
        return found

    def _one(self, pattern: re.Pattern[str]) -> str:
        found = self._take(pattern)
        if found is None:
            raise ValueError("no name")
        return found[0]

    def _expect(self, char: str) -> None:
        if not self._passes(char):
            raise ValueError(f"no {char}")

    def _passes(self, char: str) -> bool:
        self._skip()
        passed = self._text.startswith(char, self._at)
        self._at += passed
        return passed

    def _value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        if self._passes("["):
            return self._list(depth)
        if self._passes("{"):
            return self._dict(depth)
        if (string := self._take(_STRING)) is not None:
            return _ESCAPE.sub(_unescaped, string[1] if string[2] is None else string[2])
        if (number := self._take(_NUMBER)) is not None:
            return _number(number[0])
        word = self._one(_WORD)
        if word not in _WORDS:
            raise ValueError("no value")
        return _WORDS[word]

    def _list(self, depth: int) -> list[Any]:
        found: list[Any] = []
        while not self._passes("]"):
            found.append(self._value(depth + 1))
            if not self._passes(","):
                self._expect("]")
                break
        return found

    def _dict(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._passes("}"):
            key = self._value(depth + 1)
            if not isinstance(key, str):
                raise ValueError("keys are strings")
            self._expect(":")
            found[key] = self._value(depth + 1)
            if not self._passes(","):
                self._expect("}")
                break
        return found


def _number(text: str) -> int | float:
    if re.fullmatch(r"-?\d{1,400}", text):
        return int(text)
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("too large")
    return value


def _unescaped(escape: re.Match[str]) -> str:
    what = escape[1]
    if len(what) > 1:
        code = int(what[1:], 16)
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise ValueError("no character")
        return chr(code)
    return _ESCAPES.get(what, what if what in "\\'\"" else f"\\{what}")
