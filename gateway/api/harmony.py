"""How gpt-oss speaks: an answer is a row of messages, each with a header that says where it goes.

<|channel|>analysis<|message|>They want …<|end|><|start|>assistant<|channel|>final<|message|>Paris.
           └ header             └ thought       └ next message's header                      └ content
<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome"}<|call|>
                                   └ a call                            └ its arguments
Commentary for nobody in particular is told to the user: models announce there what they are about to call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, TypeAlias

from configs.grammars.source import literal
from gateway.api.pieces import CallArguments, CallBegun, Content, Piece, Reader, Stage, Thought, num_held
from gateway.api.tools.declared import ToolUse
from gateway.api.tools.format import MAX_OPENING_CHARS, CallRules, Spell, any_of, lead_rule, openai_id
from gateway.api.tools.json_call import JsonText
from gateway.api.tools.steps import SteppingReader

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"

_Body: TypeAlias = Literal["thought", "content", "call"]

_HEADS, _ENDS = (START, CHANNEL), (END, CALL, RETURN)
_TO = "commentary to=functions."
_RECIPIENT = re.compile(r"\bto=functions\.([A-Za-z0-9_.-]{1,64})")
_CHANNEL_NAME = re.compile(re.escape(CHANNEL) + r"\s{0,8}([a-z]{1,32})")


class HarmonyReader(SteppingReader):
    """`new_id` makes call ids; None: no function was declared, so there are no calls. `rest` reads content further."""

    def __init__(self, stage: Stage, new_id: Callable[[], str] | None, rest: Reader | None = None) -> None:
        super().__init__()
        self._new_id = new_id
        self._content = rest
        self._body: _Body | None = {"before": None, "inside": "thought", "after": "content"}[stage]
        self._told: set[_Body] = set()
        self._arguments: JsonText | None = None  # markers within its strings are text

    def at(self, stage: Stage) -> HarmonyReader:
        """One that reads an answer from there on."""
        return HarmonyReader(stage, self._new_id, self._content)

    def finish(self) -> list[Piece]:
        """A header that breaks off says nothing to anybody."""
        left, self._rest = self._rest, ""
        if self._body is not None:
            self._tell(left)
        if self._content is not None:
            self._pieces += self._content.finish()
        return self._take()

    def _step(self) -> bool:
        return self._read_header() if self._body is None else self._read_body(self._body)

    def _read_header(self) -> bool:
        stripped = self._rest.lstrip()
        if not any(mark.startswith(stripped) or stripped.startswith(mark) for mark in _HEADS):
            self._begin("content")  # it answers at once
            return True
        at = stripped.find(MESSAGE)
        if at < 0:
            if len(stripped) <= MAX_OPENING_CHARS:
                return False
            self._begin("content")
            self._tell(stripped[0])  # it is no marker then
            self._rest = stripped[1:]
            return True
        header, self._rest = stripped[:at], stripped[at + len(MESSAGE) :]
        recipient, channel = _RECIPIENT.search(header), _CHANNEL_NAME.search(header)
        if recipient is not None and self._new_id is not None:
            self._pieces.append(CallBegun(self._num_calls, self._new_id(), recipient[1]))
            self._num_calls += 1
            self._arguments = JsonText()
            self._begin("call")
        else:
            self._begin("thought" if channel is not None and channel[1] == "analysis" else "content")
        return True

    def _begin(self, body: _Body) -> None:
        self._body = body
        if body != "call" and body in self._told:
            self._tell("\n")  # messages of one kind are one text to the client

    def _read_body(self, body: _Body) -> bool:
        if body == "call" and self._arguments is not None:
            return self._read_arguments(self._arguments)
        found = [(at, mark) for mark in (*_ENDS, *_HEADS) if (at := self._rest.find(mark)) >= 0]
        if not found:
            held = max(num_held(self._rest, mark) for mark in (*_ENDS, *_HEADS))
            shown = len(self._rest) - held
            self._tell(self._rest[:shown])
            self._rest = self._rest[shown:]
            return False
        at, mark = min(found)
        self._tell(self._rest[:at])
        self._rest = self._rest[at + len(mark) if mark in _ENDS else at :]
        self._body = None
        return True

    def _read_arguments(self, arguments: JsonText) -> bool:
        """Up to the end of the object, or a marker that stands in none of its strings; what is no object goes on to the
        next marker."""
        if not arguments.begun:
            self._rest = self._rest.lstrip()
            if self._rest and self._rest[0] != "{":
                self._arguments = None
                return True
        found = [(at, mark) for mark in (*_ENDS, *_HEADS) if (at := self._rest.find(mark)) >= 0]
        if not found:
            end = len(self._rest) - max(num_held(self._rest, mark) for mark in (*_ENDS, *_HEADS))
        else:
            end = min(found)[0]
        if found and not end:  # a marker comes next
            if not arguments.in_string:
                self._arguments = None
                return True
            end = len(min(found)[1])
        ours = arguments.feed(self._rest[:end])
        self._tell(self._rest[:ours])
        self._rest = self._rest[ours:]
        if arguments.closed:
            self._arguments = None
        return bool(ours)

    def _tell(self, text: str) -> None:
        if not text or self._body is None:
            return
        self._told.add(self._body)
        if self._body == "call":
            self._pieces.append(CallArguments(self._num_calls - 1, text))
        elif self._body == "thought":
            self._pieces.append(Thought(text))
        else:
            self._pieces += [Content(text)] if self._content is None else self._content.feed(text)


@dataclass(frozen=True, slots=True)
class HarmonyReasoning:
    """Thoughts are a channel of their own. Like `ReasoningFormat`."""

    begin: str = CHANNEL
    end: str = END
    answer: None = None

    def reader(self, stage: Stage, rest: Reader | None) -> Reader:
        """`rest` reads what is no thought; None: it is text."""
        return rest.at(stage) if isinstance(rest, HarmonyReader) else HarmonyReader(stage, None, rest)

    def stage(self, prompt: str, *, continues: bool = False) -> Stage:
        """Where an answer to `prompt` begins. `continues`: the prompt ends within an answer."""
        thought, final = (prompt.rfind(f"{CHANNEL}{name}{MESSAGE}") for name in ("analysis", "final"))
        if continues:
            return "inside" if thought > final else "after"
        tail = prompt.rstrip()
        if tail.endswith(f"{CHANNEL}analysis{MESSAGE}"):
            return "inside"
        return "after" if tail.endswith(f"{CHANNEL}final{MESSAGE}") else "before"

    def lead(self, stage: Stage, spell: Spell) -> str:
        """Lark for what stands before content."""
        return "" if stage == "after" else _header("final", spell)

    def preface(self, stage: Stage, spell: Spell, lead: str = "") -> str:
        """See `ReasoningFormat.preface`."""
        if stage == "after":
            return ""
        end = spell(END)
        thought = f"thought[lazy]: /(.|\\n)*/ {end}" if end.startswith('"') else f"thought: /(.|\\n)*/ {end}"
        behind = f"{spell(START)} {literal('assistant')}"
        opened = f"thought {behind}" if stage == "inside" else f"({_header('analysis', spell)} thought {behind})?"
        return f"preface: {opened} {lead}\n{thought}"


@dataclass(frozen=True, slots=True)
class HarmonyTools:
    """Calls are messages to functions. A `ToolFormat`."""

    markers: tuple[str, ...] = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL)

    def reader(self, use: ToolUse, new_id: Callable[[], str]) -> Reader:
        return HarmonyReader("before", new_id)

    def spelled(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Calls (name, arguments) as the model would write them."""
        written = [
            f"{CHANNEL}{_TO}{name} {CONSTRAIN}json{MESSAGE}{json.dumps(arguments, ensure_ascii=False)}{CALL}"
            for name, arguments in calls
        ]
        return f"{START}assistant".join(written)

    def rules(self, use: ToolUse, spell: Spell) -> CallRules:
        """Where markers are tokens of their own, no text can lead to a call: only other messages can."""
        names = [f"call_{i}" for i in range(len(use.callable))]
        rules = [
            f"{name}: {literal(f'{function.name} ')} {spell(CONSTRAIN)} {literal('json')} "
            f"{spell(MESSAGE)} @{name}_schema"
            for name, function in zip(names, use.callable, strict=True)
        ]
        again = f"({spell(CALL)} {spell(START)} {literal('assistant')} {spell(CHANNEL)} {literal(_TO)} call)*"
        rules += [
            f"call: {any_of(names)}",
            f"rest: call {again if use.many else ''} {spell(CALL)}?",
            f"calls: {spell(CHANNEL)} {literal(_TO)} rest",
        ]
        is_text = spell(CHANNEL).startswith('"')
        if is_text:
            rules.append(lead_rule(literal(f"{CHANNEL}{_TO}")))
        schemas = dict(zip((f"{name}_schema" for name in names), use.schemas().values(), strict=True))
        return CallRules(tuple(rules), schemas, has_lead=is_text)

    def call_id(self, random: Random) -> str:
        return openai_id(random)


def _header(channel: str, spell: Spell) -> str:
    return f"{spell(CHANNEL)} {literal(channel)} {spell(MESSAGE)}"
