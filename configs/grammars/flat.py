"""A grammar as one text of Lark rules, for engines that take just that (vLLM's `structured_outputs.grammar`)."""

from __future__ import annotations

import json
import re
from typing import Any

from configs.grammars.source import GrammarSource
from configs.grammars.translate import to_llguidance

_REFERENCE = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])+/|@([A-Za-z_][A-Za-z0-9_]*)')
"""A string, a regular expression (neither refers to anything), or a reference."""


def to_lark(source: GrammarSource) -> str:
    """What `to_llguidance` gives, its parts put into one another. Raises GrammarError likewise."""
    parts = json.loads(to_llguidance(source))["grammars"]
    named = {part["name"]: part for part in parts[1:] if "name" in part}
    return _text(parts[0], named)


def _text(part: dict[str, Any], named: dict[str, dict[str, Any]]) -> str:
    """One part as Lark with a rule `start`; those it refers to stand inside braces."""
    if part.get("json_schema") is not None:
        return f"start: %json {json.dumps(part['json_schema'])}\n"
    rules: str = part["lark_grammar"]
    used = [name for name in dict.fromkeys(_REFERENCE.findall(rules)) if name in named]
    rules = _REFERENCE.sub(lambda match: f"{match[1]}_part" if match[1] in named else match[0], rules)
    blocks = [f"{name}_part: {_block(named[name], named)}" for name in used]
    return "\n".join([rules.rstrip("\n"), *blocks]) + "\n"


def _block(part: dict[str, Any], named: dict[str, dict[str, Any]]) -> str:
    if part.get("json_schema") is not None:
        return f"%json {json.dumps(part['json_schema'])}"
    return f"%lark {{\n{_text(part, named)}}}"
