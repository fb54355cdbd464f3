"""Every kind of grammar → llguidance's own format, and its bounds.

llguidance (https://github.com/guidance-ai/llguidance) computes token masks lazily with an Earley parser over regular
expression derivatives; docs/decisions/0009-grammars.md says why it and not another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import llguidance

from configs.grammars.source import MAX_SOURCE_BYTES, GrammarError, GrammarKind, GrammarSource, literal

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_MESSAGE_CHARS = 500

LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=400_000,
    step_lexer_fuel=40_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""About 20 ms for the first lexer, 5 ms of lexing and 1 ms of parsing a step, 40 MiB of states."""

_ANY_TEXT = r"/(.|\n)*/"


def to_llguidance(source: GrammarSource) -> str:
    """The grammar as `llguidance.LLMatcher` takes it. Raises GrammarError for what is not even well-formed; what it
    means is looked at by the matcher."""
    if source.num_bytes > MAX_SOURCE_BYTES:
        raise GrammarError(f"it has {source.num_bytes} characters, at most {MAX_SOURCE_BYTES} are allowed",
                           too_complex=True)  # fmt: skip
    try:
        body = _BODIES[source.kind](source)
    except (ValueError, UnicodeEncodeError, RecursionError) as error:
        raise GrammarError(short(str(error))) from error
    return with_preface(source.preface, body) if source.preface else body


def with_preface(preface: str, body: str) -> str:
    """A grammar that is `preface` (Lark rules, one of that name) and then `body` (llguidance's format)."""
    inner = json.loads(body)["grammars"]
    assert len(inner) == 1 or "name" in inner[0], "parts refer to one another by name"
    main = {"name": "main", "lark_grammar": f"start: preface @body\n{preface}\n"}
    return json.dumps({"grammars": [main, {**inner[0], "name": "body"}, *inner[1:]]})


def lark(source: str, parts: Iterable[tuple[str, str]] = ()) -> str:
    """Lark rules in llguidance's format; `parts` are (name, JSON schema), to be used as `@name`."""
    grammars: list[dict[str, Any]] = [{"name": "lark", "lark_grammar": source}]
    grammars += [{"name": name, "json_schema": json.loads(schema)} for name, schema in parts]
    return json.dumps({"grammars": grammars})


def short(message: str) -> str:
    """The library's message without the mark of its terse mode, bounded."""
    plain = message.replace("<non-verbose/>", "").strip()
    return plain if len(plain) <= MAX_MESSAGE_CHARS else plain[:MAX_MESSAGE_CHARS] + "…"


def refusal(message: str) -> GrammarError:
    """What the library's complaint means for who wrote the grammar."""
    if "NoExtension" in message:
        return GrammarError("nothing matches it")
    return GrammarError(short(message), too_complex=any(words in message for words in _BOUNDS_WORDS))


_BOUNDS_WORDS = ("too large", "too many", "Too many", "too big", "too deeply", "fuel exhausted", "limit", "max is")


def _json(source: GrammarSource) -> str:
    schema = json.loads(source.text)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError("a JSON schema is an object")
    return llguidance.LLMatcher.grammar_from_json_schema(source.text if schema else "{}", overrides=_options(source))


def _options(source: GrammarSource) -> JsonCompileOptions:
    options: JsonCompileOptions = {"coerce_one_of": True, "lenient": not source.strict}
    if source.whitespace:
        return {**options, "whitespace_pattern": source.whitespace}
    return {**options, "whitespace_flexible": False}


def _regex(source: GrammarSource) -> str:
    return llguidance.LLMatcher.grammar_from_regex(source.text)


def _choice(source: GrammarSource) -> str:
    choices: list[str] = json.loads(source.text)
    if not choices:
        raise GrammarError("there is nothing to choose from")
    # One terminal: the lexer takes thousands, the parser 2,000 at most, and slower.
    return lark(f"start: CHOICE\nCHOICE: {' | '.join(map(literal, choices))}\n")


def _grammar(source: GrammarSource) -> str:
    return lark(llguidance.grammar_from("grammar", source.text))


def _structural_tag(source: GrammarSource) -> str:
    """Free text in which each trigger begins a structure: `begin`, JSON after its schema, `end`."""
    tag: dict[str, Any] = json.loads(source.text)
    options = _options(source)
    rules, parts = [], []
    triggers: Sequence[str] = tag["triggers"]
    for i, structure in enumerate(tag["structures"]):
        begin: str = structure["begin"]
        trigger = next((t for t in triggers if t and begin.startswith(t)), None)
        if trigger is None:
            raise GrammarError(f"structures[{i}]: 'begin' starts with none of the triggers")
        rest = begin.removeprefix(trigger)
        rules.append(f"tag_{i}_text[lazy]: {_ANY_TEXT} {literal(trigger)}")
        rules.append(f"tag_{i}: tag_{i}_text {_optional(rest)} @tag_{i}_schema {_optional(structure['end'])}")
        parts.append((f"tag_{i}_schema", json.dumps({**_object(structure["schema"]), "x-guidance": options})))
    names = " | ".join(f"tag_{i}" for i in range(len(parts)))
    return lark("\n".join([f"start: ({names})* TEXT", f"TEXT: {_ANY_TEXT}", *rules, ""]), parts)


def _rules(source: GrammarSource) -> str:
    parts: dict[str, Any] = json.loads(source.text)
    lenient, strict = _options(source), set(parts.get("strict", ()))
    schemas = {
        name: {**_object(schema), "x-guidance": {**lenient, "lenient": False} if name in strict else lenient}
        for name, schema in parts["schemas"].items()
    }
    return lark(parts["rules"], [(name, json.dumps(schema)) for name, schema in schemas.items()])


def _optional(text: str) -> str:
    return literal(text) if text else ""


def _object(schema: object) -> dict[str, Any]:
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise GrammarError("a JSON schema is an object")
    return schema


_BODIES: dict[GrammarKind, Callable[[GrammarSource], str]] = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
    "rules": _rules,
}
