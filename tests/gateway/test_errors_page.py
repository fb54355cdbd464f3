"""docs/errors.md is the table of what the code can answer: nothing missing, nothing left over."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from gateway import errors
from gateway.errors import ApiError

ROOT = Path(__file__).parents[2]
_ROW = re.compile(r"^\| (\d{3}) \| `(\w+)` \| (?:`(\w+)`|null) \| \S.* \|$", re.MULTILINE)
_CODE = re.compile(r"[a-z]+(_[a-z]+)+")


class Row(NamedTuple):
    status: int
    type: str
    code: str | None


ROWS = {
    Row(int(status), kind, code or None) for status, kind, code in _ROW.findall((ROOT / "docs/errors.md").read_text())
}


def subclasses(root: type[ApiError]) -> Iterator[type[ApiError]]:
    for cls in root.__subclasses__():
        if cls.__module__ == errors.__name__:
            yield cls
            yield from subclasses(cls)


CLASSES = {cls.__name__: cls for cls in subclasses(ApiError)}


def codes_in(node: ast.AST) -> set[str]:
    texts = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return {text for text in texts if _CODE.fullmatch(text)}


def raised() -> Iterator[tuple[type[ApiError] | None, str]]:
    """Every code that is written out in the gateway's sources, with the class that is given it where that shows."""
    for path in sorted((ROOT / "gateway").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES:
                for keyword in node.keywords:
                    if keyword.arg == "code":
                        yield from ((CLASSES[node.func.id], code) for code in codes_in(keyword.value))
            elif isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "code" for t in node.targets):
                yield from ((None, code) for code in codes_in(node.value))


RAISED = set(raised())


def test_the_sources_were_read() -> None:
    codes = {code for _, code in RAISED}
    assert {"invalid_json", "invalid_type", "invalid_value", "queue_timeout", "no_chat_template"} <= codes
    assert len(ROWS) > 20 and len(CLASSES) > 12


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_of_errors_is_a_row(name: str) -> None:
    cls = CLASSES[name]
    assert Row(cls.status, cls.type, cls.code) in ROWS


@pytest.mark.parametrize(("cls", "code"), sorted(RAISED, key=str))
def test_every_code_that_is_given_to_an_error_is_a_row(cls: type[ApiError] | None, code: str) -> None:
    if cls is None:
        assert code in {row.code for row in ROWS}
    else:
        assert Row(cls.status, cls.type, code) in ROWS


def test_no_row_tells_of_an_error_that_nothing_raises() -> None:
    known = {code for _, code in RAISED} | {cls.code for cls in CLASSES.values()}
    assert {row.code for row in ROWS} <= known
    sources = "".join(path.read_text() for path in (ROOT / "gateway").rglob("*.py") if path.name != "errors.py")
    through_faults = {cls.__name__ for cls in errors._BY_FAULT.values()}
    assert [name for name in CLASSES if name not in through_faults and f"{name}(" not in sources] == []
