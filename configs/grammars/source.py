"""A grammar as a client writes it."""

from __future__ import annotations

import json
from typing import Literal, TypeAlias

import msgspec

GrammarKind: TypeAlias = Literal["json", "regex", "choice", "grammar", "structural_tag", "rules"]
"""json: a JSON schema. regex: in the syntax of Rust's crate of that name. choice: a JSON list of strings. grammar: GBNF
(llama.cpp's EBNF) or llguidance's Lark. structural_tag: a JSON object with `structures` and `triggers`, as vLLM's.
rules: a JSON object of ours with Lark `rules` and the JSON `schemas` that the rules refer to as `@name`; those named in
`strict` are taken as `GrammarSource.strict` says."""

MAX_SOURCE_BYTES = 128 * 1024
"""Longer grammars are refused unread. OpenAI allows 120,000 characters of names and values in a schema."""


class GrammarSource(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a text must match, whole.

    `preface` may come before it: Lark rules of which one is called `preface`, such as a block of reasoning. For JSON:
    `strict` refuses schema keywords that cannot be kept, else those are not looked at; `whitespace` is a regular
    expression of the white space between JSON's tokens, "" for none.
    """

    kind: GrammarKind
    text: str
    preface: str = ""
    strict: bool = False
    whitespace: str = r"[ ]?|\n[ \t]{0,16}"

    @property
    def has_json(self) -> bool:
        """Whether parts of what it describes are JSON after a schema."""
        return self.kind in ("json", "structural_tag", "rules")

    @property
    def num_bytes(self) -> int:
        """Size in memory, about."""
        return len(self.text) + len(self.preface) + len(self.whitespace)


class GrammarError(Exception):
    """A grammar that cannot be used. `too_complex`: it may be right, but is beyond the bounds on size, time or memory.

    The message is for who wrote the grammar.
    """

    def __init__(self, message: str, *, too_complex: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.too_complex = too_complex


def literal(text: str) -> str:
    """A string as Lark writes it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
