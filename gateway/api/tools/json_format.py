"""Calls as JSON objects, between markers or bare: most families."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from configs.grammars.source import literal
from gateway.api.pieces import Reader
from gateway.api.tools.declared import ToolUse
from gateway.api.tools.format import CallRules, Spell, any_of, lead_rule, openai_id
from gateway.api.tools.json_reader import JsonMarks, JsonReader


@dataclass(frozen=True, slots=True)
class JsonFormat:
    """Calls as JSON objects. `listed`: between the markers stands a list of them; else each has its own markers, with
    `pad` around it."""

    marks: JsonMarks = field(default_factory=JsonMarks)
    arguments_key: str = "arguments"
    listed: bool = False
    pad: str = "\n"

    @property
    def markers(self) -> tuple[str, ...]:
        return (*self.marks.begin, *filter(None, [self.marks.end]))

    def reader(self, use: ToolUse, new_id: Callable[[], str]) -> Reader:
        return JsonReader(self.marks, use.names, new_id)

    def call_id(self, random: Random) -> str:
        return openai_id(random)

    def spelled(self, calls: Sequence[tuple[str, Any]]) -> str:
        objects = [json.dumps({"name": name, self.arguments_key: arguments}, ensure_ascii=False)
                   for name, arguments in calls]  # fmt: skip
        begin = self.marks.begin[0] if self.marks.begin else ""
        if self.listed:
            return f"{begin}[{', '.join(objects)}]{self.marks.end}"
        return "\n".join(f"{begin}{self.pad}{call}{self.pad}{self.marks.end}" if begin else call for call in objects)

    def rules(self, use: ToolUse, spell: Spell) -> CallRules:
        names = [f"call_{i}" for i in range(len(use.callable))]
        rules = []
        for name, function in zip(names, use.callable, strict=True):
            opening = f'{{"name": {json.dumps(function.name)}, "{self.arguments_key}": '
            rules.append(f'{name}: {literal(opening)} @{name}_schema "}}"')
        rules.append(f"call: {any_of(names)}")
        schemas = dict(zip((f"{name}_schema" for name in names), use.schemas().values(), strict=True))
        if not self.marks.begin:
            return CallRules((*rules, "calls: call"), schemas, has_lead=False)
        end = spell(self.marks.end) if self.marks.end else ""
        begin, pad = spell(self.marks.begin[0]), literal(self.pad) if self.pad else ""
        if self.listed:
            more = '(", " call)*' if use.many else ""
            rules += [f'rest: "[" call {more} "]" {end}', f"calls: {begin} rest"]
        else:
            again = f'("\\n" {begin} rest)*' if use.many else ""
            rules += [f"rest: {pad} call {pad} {end}", f"calls: {begin} rest {again}"]
        return CallRules((*rules, lead_rule(begin)), schemas)
