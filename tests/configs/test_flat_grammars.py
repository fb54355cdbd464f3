"""Grammars as one text of Lark rules mean what their parts mean."""

from __future__ import annotations

import json

import llguidance
import pytest

from configs.grammars.flat import to_lark
from configs.grammars.source import GrammarError, GrammarSource
from configs.grammars.translate import LIMITS, to_llguidance

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
PREFACE = 'preface: "<t>" /[x-z]*/ "</t>"'
TAGS = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}
RULES = {"rules": 'start: "call @one " @one "," @two', "schemas": {"one": SCHEMA, "two": {"type": "string"}}}

CASES = [
    (GrammarSource(kind="json", text=json.dumps(SCHEMA)), ['{"a": 1}'], ['{"a": "x"}', "{}", "1"]),
    (GrammarSource(kind="json", text="true", preface=PREFACE), ["<t>xy</t>[1]"], ["[1]", "<t>a</t>1"]),
    (GrammarSource(kind="regex", text="[a-c]{2}@x"), ["ab@x"], ["ab", "zz@x"]),
    (GrammarSource(kind="regex", text="[a-c]+", preface=PREFACE), ["<t></t>abc"], ["abc"]),
    (GrammarSource(kind="choice", text='["a", "b\\nc"]'), ["a", "b\nc"], ["b"]),
    (GrammarSource(kind="grammar", text='root ::= "a" b\nb ::= "c"+'), ["acc"], ["a"]),
    (GrammarSource(kind="structural_tag", text=json.dumps(TAGS)), ['so <f>{"a": 2}</f> ok'], ["<f>x</f>"]),
    (
        GrammarSource(kind="rules", text=json.dumps(RULES), preface=PREFACE),
        ['<t>z</t>call @one {"a": 1},"s"'],
        ['call 1,"s"'],
    ),
]  # fmt: skip


def accepts(grammar: str, text: str) -> bool:
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, limits=LIMITS)
    assert not matcher.get_error(), matcher.get_error()
    data = list(text.encode())
    if matcher.validate_tokens(data) < len(data):
        return False
    matcher.consume_tokens(data)
    return bool(matcher.is_accepting())


@pytest.mark.parametrize(("source", "good", "bad"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_one_text_accepts_what_the_parts_accept(source: GrammarSource, good: list[str], bad: list[str]) -> None:
    flat = llguidance.grammar_from("grammar", to_lark(source))
    parts = to_llguidance(source)
    assert [accepts(flat, text) for text in (*good, *bad)] == [True] * len(good) + [False] * len(bad)
    assert [accepts(parts, text) for text in (*good, *bad)] == [True] * len(good) + [False] * len(bad)


def test_what_is_not_well_formed_is_refused() -> None:
    with pytest.raises(GrammarError):
        to_lark(GrammarSource(kind="json", text="{"))
