"""How a model speaks, and with it how one request's answers are constrained and read.

Speech (a model's)   chat template, tokenizer, profile ─► format of calls, format of thoughts
Reading (a request's)   which tools, where the thought stands ─► grammar for the engine, reader for the text
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec

from configs.grammars.source import MAX_SOURCE_BYTES, GrammarSource, literal
from configs.schema import ModelConfig
from gateway.api.harmony import HarmonyReasoning
from gateway.api.pieces import Content, Piece, Reader, Stage
from gateway.api.reasoning import REASONING_FORMATS, ReasoningFormat, detect_reasoning
from gateway.api.schema_rules import MAX_DEPTH, is_too_deep
from gateway.api.tools.declared import ToolUse
from gateway.api.tools.families import takes_tools, tool_format
from gateway.api.tools.format import TEXT, ToolFormat
from gateway.errors import BadRequestError, GrammarTooComplexError, InvalidGrammarError
from gateway.prompt import Prompter
from replicas.contract import Constraint


@dataclass(frozen=True, slots=True)
class Speech:
    """`tools`, `reasoning`: None when the profile says `none`, or the template knows of no thoughts. `special`: ids of
    special tokens by their text. `text_arguments`: the template takes arguments of earlier calls as text only."""

    tools: ToolFormat | None
    reasoning: ReasoningFormat | HarmonyReasoning | None
    template_takes_tools: bool
    special: Mapping[str, int]
    text_arguments: bool = False

    @classmethod
    def of(cls, model: ModelConfig, prompter: Prompter) -> Speech:
        template = "" if prompter.template is None else prompter.template.source
        thinks = detect_reasoning(template) if model.reasoning_parser == "auto" else model.reasoning_parser
        added = prompter.tokenizer.get_added_tokens_decoder()
        return cls(
            tools=None if model.tool_call_parser == "none" else tool_format(model.tool_call_parser, template),
            reasoning=None if thinks in (None, "none") else REASONING_FORMATS[thinks],
            template_takes_tools=takes_tools(template),
            special={token.content: token_id for token_id, token in added.items() if token.special},
            text_arguments=not _renders_call(prompter, {}) and _renders_call(prompter, "{}"),
        )

    def call_id(self, random: Random) -> str:
        """A new id for a tool call."""
        assert self.tools is not None, "only calls have ids"
        return self.tools.call_id(random)

    def spell(self, marker: str) -> str:
        """A marker for a grammar: special tokens go by their ids, since no text can stand for them."""
        token_id = self.special.get(marker)
        return literal(marker) if token_id is None else f"<[{token_id}]>"


class Speeches:
    """Those of all models, each worked out when first asked for."""

    def __init__(self) -> None:
        self._known: dict[str, Speech] = {}  # by model id

    def of(self, model: ModelConfig, prompter: Prompter) -> Speech:
        known = self._known.get(model.id)
        if known is None:
            known = self._known[model.id] = Speech.of(model, prompter)
        return known


def _renders_call(prompter: Prompter, arguments: dict[str, Any] | str) -> bool:
    """Whether the template can tell of an earlier call with such arguments."""
    if prompter.template is None:
        return False
    call = {"id": "callcall0", "type": "function", "function": {"name": "f", "arguments": arguments}}
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        prompter.template.render(talk, {}, generation_prompt=False)
    except BadRequestError:
        return False
    return True


class PlainReader:
    """Text that is only text."""

    def feed(self, text: str) -> list[Piece]:
        return [Content(text)]

    def finish(self) -> list[Piece]:
        return []


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one request. `stage`: where its answers begin; None for a model that does not think. `new_id` draws the id of
    a call. `show_thoughts`: the client wants them."""

    speech: Speech
    use: ToolUse | None
    stage: Stage | None
    new_id: Callable[[], str]
    show_thoughts: bool = True

    @property
    def shows_special(self) -> bool:
        """Whether special tokens must stay in the text for it to be read."""
        marks: tuple[str, ...] = ()
        if self.use is not None and self.speech.tools is not None:
            marks += self.speech.tools.markers
        if self.stage is not None and self.speech.reasoning is not None:
            marks += (self.speech.reasoning.begin, self.speech.reasoning.end)
        return any(mark in self.speech.special for mark in marks)

    def reader(self) -> Reader:
        """For one answer."""
        use, form = self.use, self.speech.tools
        calls = None if use is None or form is None else form.reader(use, self.new_id)
        if self.stage is None or self.speech.reasoning is None:
            return calls or PlainReader()
        return self.speech.reasoning.reader(self.stage, calls)

    def finish_reason(self, reason: str | None, num_calls: int) -> str | None:
        """OpenAI's: calls have their own, but for a function that the client itself has named."""
        if reason == "stop" and num_calls and self.use is not None and not self.use.named:
            return "tool_calls"
        return reason

    def constrained(self, constraint: Constraint | None) -> Constraint | None:
        """What the answers must follow: the client's constraint, the calls it demands, a thought before either.

        Raises BadRequestError for demands that exclude one another.
        """
        wanted = self._with_calls(constraint)
        if wanted is None or self.stage is None or self.speech.reasoning is None:
            return wanted
        lead = self._lead() if wanted is constraint else ""  # rules of calls have it where it belongs
        preface = self.speech.reasoning.preface(self.stage, self.speech.spell, lead)
        return msgspec.structs.replace(wanted, source=msgspec.structs.replace(wanted.source, preface=preface))

    def _lead(self) -> str:
        """Lark for what this family writes before content."""
        if self.stage is None or self.speech.reasoning is None:
            return ""
        return self.speech.reasoning.lead(self.stage, self.speech.spell)

    def _with_calls(self, constraint: Constraint | None) -> Constraint | None:
        use, form = self.use, self.speech.tools
        if use is None or form is None or not (use.forced or use.strict or constraint):
            return constraint
        _check_size(use)
        calls = form.rules(use, self.speech.spell)
        rules, schemas = list(calls.rules), dict(calls.schemas)
        strict = {name for name in schemas if use.callable[int(name.split("_")[1])].strict}  # they are call_0_…
        if use.forced:
            start = "start: calls"
        elif constraint is not None:
            start = f"start: calls | {self._lead()} @content"
            schemas["content"] = _schema_of(constraint)
            strict |= {"content"} if constraint.source.strict else set()
        elif calls.has_lead:
            start = f"start: {'(lead rest)* TEXT' if use.many else _ONE_CALL}\nTEXT: {TEXT}"
        elif self._lead():
            start = f"start: calls | {self._lead()} TEXT\nTEXT: {TEXT}"
        else:
            start = f"start: calls | TEXT\nTEXT: {_NO_OBJECT}"
        parts = {"rules": "\n".join([start, *rules, ""]), "schemas": schemas, "strict": sorted(strict)}
        text = json.dumps(parts, ensure_ascii=False)
        if constraint is None:
            return Constraint(source=GrammarSource(kind="rules", text=text), param="tools")
        source = GrammarSource(kind="rules", text=text, whitespace=constraint.source.whitespace)
        return Constraint(source=source, param=constraint.param)


_ONE_CALL = r"TEXT | lead rest /\s*/"
"""Text after the call could hold another one, as text."""

_NO_OBJECT = r"/([^{\[\s](.|\n)*)?/"
"""Text that cannot be taken for a bare call."""


def _check_size(use: ToolUse) -> None:
    """Formats copy from schemas what their rules need. Raises GrammarTooComplexError."""
    size = sum(len(msgspec.json.encode(schema)) for schema in use.schemas().values())
    if size > MAX_SOURCE_BYTES:
        words = f"the schemas have {size} characters together, at most {MAX_SOURCE_BYTES} can be enforced"
        raise GrammarTooComplexError(f"Invalid value for 'tools': {words}.", param="tools")


def _schema_of(constraint: Constraint) -> Any:
    if constraint.source.kind != "json":
        raise BadRequestError(
            f"'{constraint.param}' cannot be combined with 'tools'; JSON schemas can.", param=constraint.param
        )
    try:
        schema = json.loads(constraint.source.text)
    except (ValueError, RecursionError) as error:
        raise InvalidGrammarError(f"Invalid value for '{constraint.param}': {error}.", param=constraint.param) from None
    if is_too_deep(schema):
        words = f"it is nested more than {MAX_DEPTH} levels deep"
        raise GrammarTooComplexError(f"Invalid value for '{constraint.param}': {words}.", param=constraint.param)
    return schema
