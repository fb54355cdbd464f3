"""Calls of GLM 4.5 to 4.7: the name, then a pair of tags for each parameter, its value as plain text.

<tool_call>weather
<arg_key>city</arg_key>
<arg_value>Paris</arg_value>
</tool_call>
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from configs.grammars.source import literal
from gateway.api.pieces import Reader
from gateway.api.tools.declared import ToolUse
from gateway.api.tools.format import CallRules, Spell, any_of, lead_rule, openai_id
from gateway.api.tools.parameters import ParameterSchemas, parameter, required, unreadable
from gateway.api.tools.qwen_xml import BLOCK, CLOSING, QwenXmlReader, XmlSyntax, plain, value_rule

_NAME = re.compile(r"[A-Za-z0-9_.-]{0,64}\s*")
_KEY = "<arg_key>"


def _may_open(text: str) -> bool:
    name = _NAME.match(text)
    assert name is not None, "it matches the empty text"
    rest = text[name.end() :]
    return _KEY.startswith(rest) or CLOSING.startswith(rest)


_SYNTAX = XmlSyntax(
    begins=(BLOCK,),
    function=re.compile(rf"\s*([A-Za-z0-9_.-]{{1,64}})\s*(?={_KEY}|{CLOSING})"),
    may_open=_may_open,
    name=_KEY,
    name_end="</arg_key>",
    value="<arg_value>",
    value_end="</arg_value>",
    end=CLOSING,
    known_only=True,
)


@dataclass(frozen=True, slots=True)
class GlmFormat:
    """GLM's tags."""

    @property
    def markers(self) -> tuple[str, ...]:
        return (BLOCK, CLOSING, _KEY, "</arg_key>", "<arg_value>", "</arg_value>")

    def reader(self, use: ToolUse, new_id: Callable[[], str]) -> Reader:
        return QwenXmlReader(use.schemas(), new_id, _SYNTAX)

    def call_id(self, random: Random) -> str:
        return openai_id(random)

    def spelled(self, calls: Sequence[tuple[str, Any]]) -> str:
        return "\n".join(
            f"{BLOCK}{name}\n"
            + "".join(f"{_key(key)}<arg_value>{plain(value)}</arg_value>\n" for key, value in arguments.items())
            + CLOSING
            for name, arguments in calls
        )

    def rules(self, use: ToolUse, spell: Spell) -> CallRules:
        names = [f"call_{i}" for i in range(len(use.callable))]
        rules: list[str] = []
        schemas = ParameterSchemas()
        for name, function, schema in zip(names, use.callable, use.schemas().values(), strict=True):
            parts, needed = [], required(schema)
            for j, key in enumerate(schema.get("properties", {})):
                if _SYNTAX.name_end in key:
                    raise unreadable(function.name, key)
                rule = f"{name}_{j}"
                parts.append(rule if key in needed else f"{rule}?")
                rules.append(f"{rule}: {literal(_key(key) + '<arg_value>')} {rule}_value")
                rules.append(value_rule(rule, parameter(schema, key), schemas, "</arg_value>\n"))
            rules.append(f"{name}: {literal(function.name + chr(10))} {' '.join(parts)}")
        begin, end = spell(BLOCK), spell(CLOSING)
        again = f'("\\n" {begin} rest)*' if use.many else ""
        rules += [f"rest: ({any_of(names)}) {end}", f"calls: {begin} rest {again}", lead_rule(begin)]
        return CallRules(tuple(rules), schemas.taken)


def _key(key: str) -> str:
    return f"{_KEY}{key}</arg_key>\n"
