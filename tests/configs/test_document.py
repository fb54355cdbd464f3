"""Reading YAML: values by the core schema of YAML 1.2, lines of every key."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.document import read_text, write_text
from configs.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("010", 10),
        ("0x1F", 31),
        ("-3", -3),
        ("1e-3", 0.001),
        (".5", 0.5),
        ("1.", 1.0),
        ("12:30", "12:30"),
        ("2026-11-21", "2026-11-21"),
        ("'5'", "5"),
        ("1.2.3", "1.2.3"),
        ("=", "="),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    found = read_text(f"key: {text}", "t").tree["key"]
    assert found == value
    assert type(found) is type(value)


def test_lines_are_those_of_the_keys() -> None:
    document = read_text("a:\n  b:\n    - 1\n    - c: 2\n", "t")
    lines = {path: origin.line for path, origin in document.origins.items()}
    assert lines == {(): 1, ("a",): 1, ("a", "b"): 2, ("a", "b", 0): 3, ("a", "b", 1): 4, ("a", "b", 1, "c"): 4}


def test_origin_of_an_absent_key_is_its_section() -> None:
    assert str(read_text("a:\n  b: 1\n", "t").origin_of(("a", "c", 0))) == "t:1"


def test_merge_keys_bring_values_that_own_keys_override() -> None:
    tree = read_text("base: &b {x: 1, y: 2}\nown:\n  <<: *b\n  y: 3\n", "t").tree
    assert tree["own"] == {"x": 1, "y": 3}


def test_one_alias_used_twice_is_not_a_cycle() -> None:
    assert read_text("a: &x [1]\nb: [*x, *x]\n", "t").tree["b"] == [[1], [1]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "t:3: a: duplicate key, first given in line 1"),
        ("? [a]\n: 1\n", "t:1: a key must be a word"),
        (
            "a: 1\n---\nb: 2\n",
            "t:2: not valid YAML: expected a single document in the stream, but found another document",
        ),
        ("a: *nope\n", "t:1: not valid YAML: found undefined alias 'nope'"),
        ("a: !!int x\n", "t:1: a: not a number: 'x'"),
        ("a: 1\nb: \x00\n", "t:2: not valid YAML: special characters are not allowed"),
        ("[" * 5000, "t: nested too deeply"),
    ],
)
def test_bad_documents_are_one_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_text(text, "t")
    assert str(caught.value) == expected


_WORDS = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]))
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), _WORDS)
_TREES = st.recursive(_SCALARS, lambda inner: st.one_of(st.lists(inner), st.dictionaries(_WORDS, inner)), max_leaves=20)


@settings(deadline=None)
@given(_TREES)
@example({"on": "no", "a": "1e3", "b": "010", "c": "12:30", "d": "~", "e": "yes", "f": "0x1F", "g": 1e-05, "h": "<<"})
def test_written_text_is_read_as_the_same_tree(tree: Any) -> None:
    assert read_text(write_text(tree), "it").tree == tree
