"""The grammars that calls and thoughts are enforced with, followed by hand through the library."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import llguidance
import msgspec
import pytest

from configs.grammars.source import MAX_SOURCE_BYTES, GrammarSource, literal
from configs.grammars.translate import LIMITS, to_llguidance
from gateway.api.pieces import CallArguments, Stage
from gateway.api.reasoning import REASONING_FORMATS
from gateway.api.speech import Reading, Speech
from gateway.api.tools.declared import FunctionDefinition, ToolUse
from gateway.api.tools.families import TOOL_FORMATS
from gateway.errors import BadRequestError, GrammarTooComplexError
from replicas.contract import Constraint

END = 256
THINK_TOKEN = 257  # a special token in some of the tests
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


class Bytes:
    """Bytes, end of sequence, and one special token."""

    eos_token_id = END
    bos_token_id = None
    tokens = (*(bytes([i]) for i in range(256)), b"\xff<eos>", b"\xff</think>")
    special_token_ids = (END, THINK_TOKEN)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


TOKENIZER = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))


def follows(constraint: Constraint | None, text: str | list[int]) -> bool:
    """Whether a text is a whole answer."""
    assert constraint is not None
    matcher = llguidance.LLMatcher(TOKENIZER, to_llguidance(constraint.source), log_level=0, limits=LIMITS)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode()) if isinstance(text, str) else text
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def reading(name: str, stage: Stage | None = None, special: dict[str, int] | None = None, **use: Any) -> Reading:
    strict = use.pop("strict", False)
    functions = (FunctionDefinition(name="weather", parameters=CITY, strict=strict), FunctionDefinition(name="now"))
    speech = Speech(TOOL_FORMATS[name], REASONING_FORMATS["qwen3"], True, special or {})
    return Reading(speech, ToolUse((), functions, **use), stage, lambda: "id")


CALLS = [("weather", {"city": "Rome"}), ("now", {})]


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_what_a_family_spells_is_what_is_enforced(name: str) -> None:
    form = TOOL_FORMATS[name]
    many, one = reading(name, forced=True), reading(name, forced=True, many=False)
    for call in CALLS:
        assert follows(many.constrained(None), form.spelled([call]))
        assert follows(one.constrained(None), form.spelled([call]))
    bare = name in ("llama3_json", "llama4_json", "json")
    assert follows(many.constrained(None), form.spelled(CALLS)) != bare, "bare formats make one call"
    assert not follows(one.constrained(None), form.spelled(CALLS))
    for wrong in ("", "No.", form.spelled([("other", {})]), form.spelled([("weather", {"city": "Oslo"})])):
        assert not follows(many.constrained(None), wrong)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_strict_calls_are_enforced_once_they_begin(name: str) -> None:
    form, constraint = TOOL_FORMATS[name], reading(name, strict=True).constrained(None)
    right, wrong = form.spelled(CALLS[:1]), form.spelled([("weather", {"city": "Oslo"})])
    assert follows(constraint, "Just text with a < and a } in it.") and follows(constraint, right)
    assert not follows(constraint, wrong)
    if form.markers:
        assert follows(constraint, f"Let me see. {right}") and not follows(constraint, f"Let me see. {wrong}")
    assert reading(name).constrained(None) is None, "other functions are called as the model likes"


def test_a_response_format_holds_for_what_is_no_call() -> None:
    wanted = Constraint(source=GrammarSource(kind="json", text='{"enum": ["yes"]}'), param="response_format")
    constraint = reading("hermes").constrained(wanted)
    assert follows(constraint, '"yes"') and follows(constraint, TOOL_FORMATS["hermes"].spelled(CALLS))
    assert not follows(constraint, '"no"') and not follows(constraint, "yes")
    assert constraint is not None and constraint.param == "response_format"


@pytest.mark.parametrize(
    ("stage", "right", "wrong"),
    [
        (
            "before",
            ["ab", "<think>so\n</think>\n\nab", "<think></think>ab"],
            ["x ab", "<think>ab", "<think>a</think>x"],
        ),
        ("inside", ["so\n</think>\n\nab", "</think>ab", "a</thi</think>ab"], ["ab", "so</think>\n\n\nab", "</think>x"]),
        ("after", ["ab"], ["<think></think>ab", "</think>ab"]),
    ],
)
@pytest.mark.parametrize("kind", ["regex", "json"])
def test_a_thought_comes_before_what_follows_a_grammar(
    stage: Stage, right: list[str], wrong: list[str], kind: str
) -> None:
    source = (
        GrammarSource(kind="regex", text="ab") if kind == "regex" else GrammarSource(kind="json", text='{"const": 1}')
    )
    thinking = Reading(reading("hermes").speech, None, stage, lambda: "id")
    constraint = thinking.constrained(Constraint(source=source))
    for text in right:
        assert follows(constraint, text if kind == "regex" else text.removesuffix("ab") + "1"), text
    for text in wrong:
        assert not follows(constraint, text), text


def test_a_thought_ends_at_a_token_where_its_tag_is_one() -> None:
    thinking = Reading(reading("hermes", special={"</think>": THINK_TOKEN}).speech, None, "inside", lambda: "id")
    constraint = thinking.constrained(Constraint(source=GrammarSource(kind="regex", text="ab")))
    assert follows(constraint, [*b"so </think> is text here", THINK_TOKEN, *b"\nab"])
    assert not follows(constraint, "so </think>\nab")
    assert thinking.shows_special


def test_gpt_oss_content_has_a_header_of_its_own_that_no_schema_knows() -> None:
    speech = Speech(TOOL_FORMATS["openai"], REASONING_FORMATS["openai_gptoss"], True, {})
    thought = "<|channel|>analysis<|message|>so<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>"
    wanted = Constraint(source=GrammarSource(kind="json", text='{"const": 1}'), param="response_format")
    plain = Reading(speech, None, "before", lambda: "id").constrained(wanted)
    assert follows(plain, f"{thought}{final}1") and follows(plain, f"{final}1")
    assert not follows(plain, "1") and not follows(plain, f"{thought}1") and not follows(plain, f"{final}2")
    inside = Reading(speech, None, "inside", lambda: "id").constrained(wanted)
    assert follows(inside, f"so<|end|><|start|>assistant{final}1") and not follows(inside, f"{final}1")
    assert follows(Reading(speech, None, "after", lambda: "id").constrained(wanted), "1")
    functions = (FunctionDefinition(name="weather", parameters=CITY),)
    call, forced = speech.tools.spelled(CALLS[:1]) if speech.tools else "", ToolUse((), functions, forced=True)
    made = Reading(speech, forced, "before", lambda: "id").constrained(None)
    assert follows(made, f"{thought}{call}") and follows(made, call) and not follows(made, f"{final}{call}")
    either = Reading(speech, ToolUse((), functions), "before", lambda: "id").constrained(wanted)
    assert follows(either, f"{thought}{final}1") and follows(either, f"{thought}{call}") and not follows(either, "1")


def test_gpt_oss_markers_that_are_tokens_stand_for_themselves() -> None:
    functions = (FunctionDefinition(name="weather", parameters=CITY, strict=True),)
    special = {"<|channel|>": THINK_TOKEN}
    speech = Speech(TOOL_FORMATS["openai"], REASONING_FORMATS["openai_gptoss"], True, special)
    strict = Reading(speech, ToolUse((), functions), "before", lambda: "id").constrained(None)
    call = b'commentary to=functions.weather <|constrain|>json<|message|>{"city": "%s"}'
    assert follows(strict, [THINK_TOKEN, *(call % b"Rome")]) and not follows(strict, [THINK_TOKEN, *(call % b"Oslo")])
    assert follows(strict, [THINK_TOKEN, *b"final<|message|>Any text."])


def test_thoughts_come_before_calls_too() -> None:
    call = TOOL_FORMATS["hermes"].spelled(CALLS[:1])
    constraint = reading("hermes", "inside", forced=True).constrained(None)
    assert follows(constraint, f"I call.\n</think>\n\n{call}") and not follows(constraint, call)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_ids_of_calls_fit_the_family(name: str) -> None:
    first, second = (TOOL_FORMATS[name].call_id(random) for random in [Random(1)] * 2)
    assert first != second
    assert (len(first) == 9 and first.isalnum()) if name == "mistral" else first.startswith("call_")


def test_mistrals_newer_tokenizers_put_a_marker_between_name_and_arguments() -> None:
    from gateway.api.tools.families import tool_format

    form = tool_format("auto", "[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}")
    use = reading("mistral", forced=True).use
    assert use is not None
    assert form.spelled(CALLS) == '[TOOL_CALLS]weather[ARGS]{"city": "Rome"}[TOOL_CALLS]now[ARGS]{}'
    rules = form.rules(use, literal)
    text = json.dumps({"rules": "\n".join(["start: calls", *rules.rules, ""]), "schemas": rules.schemas})
    constraint = Constraint(source=GrammarSource(kind="rules", text=text))
    assert follows(constraint, form.spelled(CALLS)) and not follows(constraint, "[TOOL_CALLS]weather{}")


def use_of(*functions: FunctionDefinition, **use: Any) -> Reading:
    speech = Speech(TOOL_FORMATS[use.pop("name", "hermes")], None, True, {})
    return Reading(speech, ToolUse((), functions, **use), None, lambda: "id")


def taking(schema: dict[str, Any], key: str = "a", name: str = "f", **more: Any) -> FunctionDefinition:
    """A function of one parameter."""
    parameters = {"type": "object", "properties": {key: schema}, "required": [key], **more}
    return FunctionDefinition(name=name, parameters=parameters)


PYTHONIC = ("pythonic", "llama4_pythonic", "lfm2", "olmo3")


@pytest.mark.parametrize("key", ["a", "first name", "$id", "a-b", "1", "ünï", "k>", "a=b", "x</arg_key>"])
@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_parameter_is_read_as_it_is_enforced_or_refused(name: str, key: str) -> None:
    form = TOOL_FORMATS[name]
    asked = use_of(taking({"type": "integer"}, key), name=name, forced=True)
    try:
        constraint = asked.constrained(None)
    except BadRequestError as error:
        assert error.code == "invalid_function_parameters" and error.param == "tools"
        ends = {"qwen3_coder": ">", "qwen3_xml": ">", "glm45": "</arg_key>", "glm47": "</arg_key>"}
        assert ends[name] in key if name in ends else name in PYTHONIC and key in ("first name", "a=b")
        return
    written = form.spelled([("f", {key: 7})])
    assert follows(constraint, written)
    reader = asked.reader()
    pieces = reader.feed(written) + reader.finish()
    assert json.loads("".join(each.text for each in pieces if isinstance(each, CallArguments))) == {key: 7}


@pytest.mark.parametrize("function", ["3d", "-x", "_", "a-b"])
@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_function_is_read_as_it_is_enforced(name: str, function: str) -> None:
    asked = use_of(FunctionDefinition(name=function), name=name, forced=True)
    written = TOOL_FORMATS[name].spelled([(function, {})])
    assert follows(asked.constrained(None), written)
    reader = asked.reader()
    assert getattr((reader.feed(written) + reader.finish())[0], "name", None) == function


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "glm45", "pythonic"])
def test_definitions_are_copied_where_they_are_needed_and_only_so_far(name: str) -> None:
    unused = {f"d{i}": {"type": "string", "description": "x" * 60} for i in range(700)}
    used = {"x~/y": {"type": "array", "items": {"$ref": "#/$defs/one"}}, "one": {"enum": [1, 2]}}
    many = FunctionDefinition(
        name="many",
        parameters={
            "type": "object",
            "properties": {f"p{i}": {"type": "integer"} for i in range(700)},
            "$defs": unused,
        },
    )
    needs = taking({"$ref": "#/$defs/x~0~1y"}, "a", "needs", **{"$defs": {**unused, **used}})
    large = use_of(many, name=name, forced=True).constrained(None)
    assert large is not None and large.source.num_bytes < MAX_SOURCE_BYTES
    right, wrong = (TOOL_FORMATS[name].spelled([("needs", {"a": [value]})]) for value in (1, 3))
    constraint = use_of(needs, name=name, forced=True).constrained(None)
    assert follows(constraint, right) and not follows(constraint, wrong)
    shared = {"type": "object", "properties": {f"q{i}": {"type": "integer"} for i in range(900)}}
    bomb = FunctionDefinition(
        name="bomb",
        parameters={
            "type": "object",
            "properties": {f"p{i}": {"$ref": "#/$defs/shared"} for i in range(900)},
            "$defs": {"shared": shared},
        },
    )
    if name == "hermes":
        assert use_of(bomb, name=name, forced=True).constrained(None) is not None, "it copies nothing"
    else:
        with pytest.raises(GrammarTooComplexError):
            use_of(bomb, name=name, forced=True).constrained(None)
    with pytest.raises(GrammarTooComplexError, match="together"):
        use_of(many, msgspec.structs.replace(many, name="more"), name=name, forced=True).constrained(None)
    assert use_of(many, many, name=name).constrained(None) is None, "nothing is enforced"


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_an_enum_that_is_no_list_says_nothing(name: str) -> None:
    constraint = use_of(taking({"type": "string", "enum": 5}), name=name, forced=True).use
    assert constraint is not None
    assert TOOL_FORMATS[name].rules(constraint, literal).rules


@pytest.mark.parametrize("name", [name for name, form in TOOL_FORMATS.items() if form.markers])
def test_one_strict_call_is_the_end_of_an_answer_that_may_have_no_more(name: str) -> None:
    form = TOOL_FORMATS[name]
    one, two = form.spelled(CALLS[:1]), form.spelled(CALLS[:1]) + form.spelled(CALLS[:1])
    many, single = (reading(name, strict=True, many=many).constrained(None) for many in (True, False))
    assert follows(many, two) and not follows(single, two) and not follows(single, form.spelled(CALLS))
    for right in (one, f"Let me see. {one}", f"{one}\n", "No call.", ""):
        assert follows(single, right), right
    assert not follows(single, f"{one} And now?")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "glm45", "pythonic", "mistral", "kimi_k2"])
def test_strictness_is_kept_beside_tools_for_each_schema(name: str, strict: bool) -> None:
    numbers = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}  # cannot be enforced
    picky = msgspec.structs.replace(taking(numbers, additionalProperties=False), strict=strict)
    other = msgspec.structs.replace(taking({"type": "integer"}, "b", "g", additionalProperties=False), strict=True)
    call = TOOL_FORMATS[name].spelled([("g", {"b": 7})])
    assert understood(use_of(picky, other, name=name, forced=True).constrained(None)) is not strict
    lenient = use_of(msgspec.structs.replace(picky, strict=False), other, name=name, forced=True)
    assert follows(lenient.constrained(None), call)
    source = GrammarSource(kind="json", text=json.dumps(numbers), strict=strict)
    beside = use_of(other, name=name).constrained(Constraint(source=source, param="response_format"))
    assert understood(beside) is not strict


def understood(constraint: Constraint | None) -> bool:
    assert constraint is not None
    matcher = llguidance.LLMatcher(TOKENIZER, to_llguidance(constraint.source), log_level=0, limits=LIMITS)
    return not matcher.is_error()
