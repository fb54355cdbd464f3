"""Tool calls and thoughts in texts of every family, whole and in pieces of every size."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.api.pieces import CallArguments, CallBegun, Content, Piece, Reader, Stage, Thought, num_held
from gateway.api.reasoning import REASONING_FORMATS, detect_reasoning
from gateway.api.tools.declared import FunctionDefinition, ToolUse
from gateway.api.tools.families import TOOL_FORMATS, detect_tools, takes_tools, tool_format
from gateway.api.tools.parameters import kinds

WEATHER = FunctionDefinition(
    name="weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}},
        "required": ["city"],
    },
)
USE = ToolUse((), (WEATHER, FunctionDefinition(name="now")))
PARIS = {"city": 'Par}is "x" [TOOL_CALLS] </tool_call>é'}


def ids() -> Callable[[], str]:
    count = iter(range(99))
    return lambda: f"id{next(count)}"


def reader_of(name: str) -> Reader:
    return TOOL_FORMATS[name].reader(USE, ids())


def told(reader: Reader, pieces: list[str]) -> list[Any]:
    """Everything read, neighbours joined: text as str, a thought as ("thought", text), a call as [name, arguments]."""
    found: list[Any] = []
    parts: list[Piece] = [part for piece in pieces for part in reader.feed(piece)] + reader.finish()
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, Content):
            found[-1:] = [last + part.text] if isinstance(last, str) else [*found[-1:], part.text]
        elif isinstance(part, Thought):
            joined = last[1] + part.text if isinstance(last, tuple) else part.text
            found[-1:] = [("thought", joined)] if isinstance(last, tuple) else [*found[-1:], ("thought", joined)]
        elif isinstance(part, CallBegun):
            assert part.index == sum(isinstance(each, list) for each in found)
            assert part.call_id in (f"id{part.index}", f"functions.{part.name}:{part.index}")
            found.append([part.name, ""])
        else:
            assert isinstance(part, CallArguments) and isinstance(last, list), "arguments follow their call"
            last[1] += part.text
    return found


def call(name: str, key: str = "arguments", **arguments: Any) -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


ARGUMENTS = json.dumps(PARIS, ensure_ascii=False)
HERMES = f"<tool_call>\n{call('weather', **PARIS)}\n</tool_call>"
HARMONY = f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>"
PARIS_CALL = ["weather", ARGUMENTS]
CASES: list[tuple[str, str, list[Any]]] = [
    ("hermes", "Just text, with < and <tool and {.", ["Just text, with < and <tool and {."]),
    ("hermes", HERMES, [["weather", ARGUMENTS]]),
    ("hermes", f"Let me look.\n{HERMES}\n{HERMES}\n", ["Let me look.", ["weather", ARGUMENTS], ["weather", ARGUMENTS]]),
    ("hermes", f"<tool_call>[{call('weather')}, {call('now')}]</tool_call>", [["weather", "{}"], ["now", "{}"]]),
    ("hermes", '<tool_call>{"arguments": {"a": [{"b": 2}]}, "name": "now"}</tool_call>',
     [["now", '{"a": [{"b": 2}]}']]),
    ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', [["now", '{"a": 1}']]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call> and text', [["now", "{}"], " and text"]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": ', [["now", '{"a": ']]),
    ("hermes", "a <tool_call>no call</tool_call> b", ["a <tool_call>no call</tool_call> b"]),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', ['<tool_call>{"name": 5}</tool_call>']),
    ("hermes", "<tool_call></tool_call>", ["<tool_call></tool_call>"]),
    ("hermes", f"{HERMES}\n<tool_call>\n", [["weather", ARGUMENTS]]),
    ("hermes", f"{HERMES} <tool_call>no call", [["weather", ARGUMENTS], " <tool_call>no call"]),
    ("openai", f"<|channel|>analysis<|message|>Hm <|.<|end|><|start|>assistant{HARMONY}",
     [("thought", "Hm <|."), PARIS_CALL]),
    ("openai", f"{HARMONY}<|start|>assistant{HARMONY}", [PARIS_CALL, PARIS_CALL]),
    ("openai", f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{HARMONY}", ["I look.", PARIS_CALL]),
    ("openai", "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}", [["now", "{}"]]),
    ("openai", "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
     "<|start|>assistant<|channel|>final<|message|>c<|return|>", [("thought", "a\nb"), "c"]),
    ("openai", '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city',
     [["weather", '{"city']]),
    ("openai", "<|channel|>analysis to=python<|message|>1 + 1<|call|>", [("thought", "1 + 1")]),
    ("openai", "<|channel|>final<|message|>a < b<|e", ["a < b<|e"]),
    ("openai", HARMONY.replace(ARGUMENTS, '{"a": "<|end|> \\"<|call|>"} '),
     [["weather", '{"a": "<|end|> \\"<|call|>"} ']]),
    ("openai", HARMONY.replace(ARGUMENTS, " [1] {"), [["weather", "[1] {"]]),
    ("openai", HARMONY.replace(ARGUMENTS, '{"a": 1') + "<|start|>assistant<|channel|>final<|message|>So.",
     [["weather", '{"a": 1'], "So."]),
    ("openai", "<|channel|>fin", []),
    ("openai", "Just text, with < and <|chan.", ["Just text, with < and <|chan."]),
    ("openai", f"<|channel|>{'x' * 300}", [f"<|channel|>{'x' * 300}"]),
    ("hermes", '<tool_call>{"na', ['<tool_call>{"na']),
    ("hermes", "", []),
    ("smollm2", f"<tool_call>[{call('now', a=1)}]</tool_call>", [["now", '{"a": 1}']]),
    ("llama3_json", call("weather", "parameters", city="x"), [["weather", '{"city": "x"}']]),
    ("llama3_json", f"{call('now', 'parameters')}; {call('now', 'parameters')}", [["now", "{}"], ["now", "{}"]]),
    ("llama3_json", '{"name": "stranger", "parameters": {}}', ['{"name": "stranger", "parameters": {}}']),
    ("llama3_json", 'Not {"name": "now"}', ['Not {"name": "now"}']),
    ("json", '{"answer": [1, 2]} yes', ['{"answer": [1, 2]} yes']),
    ("json", f" [{call('now')}]", [["now", "{}"]]),
    ("mistral", f"[TOOL_CALLS][{call('weather', **PARIS)}, {call('now')}]", [["weather", ARGUMENTS], ["now", "{}"]]),
    ("mistral", f"Hm. [TOOL_CALLS]weather{ARGUMENTS}[TOOL_CALLS]now[CALL_ID]x9[ARGS]{{}}",
     ["Hm.", ["weather", ARGUMENTS], ["now", "{}"]]),
    ("mistral", "[TOOL_CALLS] is a marker", ["[TOOL_CALLS] is a marker"]),
    ("mistral", "[TOOL_CALLS]weather", ["[TOOL_CALLS]weather"]),
    ("granite", f"<|tool_call|>[{call('now')}]", [["now", "{}"]]),
    ("internlm", f"<|action_start|><|plugin|>{call('now', 'parameters')}<|action_end|>", [["now", "{}"]]),
    ("jamba", f"<tool_calls>[{call('now')}]</tool_calls>", [["now", "{}"]]),
    ("phi4_mini_json", f"functools[{call('now')}]", [["now", "{}"]]),
    ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=city>\nSt. \"D\"\nden\n</parameter>\n"
     "<parameter=days>\n3\n</parameter>\n<parameter=tags>\n[1, \"a\"]\n</parameter>\n</function>\n</tool_call>",
     [["weather", '{"city": "St. \\"D\\"\\nden", "days": 3, "tags": [1, "a"]}']]),
    ("qwen3_coder", "So: <function=now>\n</function> done", ["So:", ["now", "{}"], " done"]),
    ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=days>\nsoon\n</parameter>\n</function>\n</tool_call>\n"
     "<tool_call>\n<function=now>\n</function>\n</tool_call>", [["weather", '{"days": "soon"}'], ["now", "{}"]]),
    ("qwen3_coder", "<tool_call>none</tool_call>", ["<tool_call>none</tool_call>"]),
    ("qwen3_coder", "<tool_call>\n<function=weather>\n<parameter=city>\nPar", [["weather", "{"]]),
    ("deepseek_v31", f"So. <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ARGUMENTS}"
     "<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜> Done.",
     ["So.", ["weather", ARGUMENTS], ["now", "{}"], " Done."]),
    ("deepseek_v31", "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{\"a", [["now", '{"a']]),
    ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>no call<｜tool▁call▁end｜> a",
     ["<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>no call<｜tool▁call▁end｜> a"]),
    ("deepseek_v31", f"<｜tool▁call▁begin｜>{'x' * 400}", [f"<｜tool▁call▁begin｜>{'x' * 400}"]),
    ("deepseek_v31", "a <｜tool▁calls▁begin｜><｜tool▁calls▁end｜> b",
     ["a <｜tool▁calls▁begin｜><｜tool▁calls▁end｜> b"]),
    ("deepseek_v3", f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
     f"{ARGUMENTS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```<｜tool▁call▁end｜>"
     "<｜tool▁calls▁end｜>", [["weather", ARGUMENTS], ["now", "{}"]]),
    ("glm45", "Hm.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>St. \"D\"\nden</arg_value>\n<arg_key>days"
     "</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
     ["Hm.", ["weather", '{"city": "St. \\"D\\"\\nden", "days": 3}'], ["now", "{}"]]),
    ("glm47", "<tool_call>weather<arg_key>tags</arg_key><arg_value>[1]</arg_value></tool_call> So",
     [["weather", '{"tags": [1]}'], " So"]),
    ("glm45", "<tool_call>stranger</tool_call>", ["<tool_call>stranger</tool_call>"]),
    ("pythonic", "[weather(city='St. \\'D\\'\\n\\u00e9', days=3), now()]",
     [["weather", '{"city": "St. \'D\'\\né", "days": 3}'], ["now", "{}"]]),
    ("pythonic", 'now()', ['now()']),
    ("pythonic", '[weather(city="(]", tags=[1, -2.5e3, {"a": (1)}]), now()]',
     ['[weather(city="(]", tags=[1, -2.5e3, {"a": (1)}]), now()]']),
    ("pythonic", '[weather(tags=[1, -2.5e3, {"a": None,}, true,])]',
     [["weather", '{"tags": [1, -2500.0, {"a": null}, true]}']]),
    ("pythonic", "[1, 2] are numbers", ["[1, 2] are numbers"]),
    ("pythonic", "[stranger(a=1)]", ["[stranger(a=1)]"]),
    ("llama4_pythonic", "So.\n<|python_start|>[now()]<|python_end|> Done", ["So.", ["now", "{}"], " Done"]),
    ("lfm2", "<|tool_call_start|>[now(), now()]<|tool_call_end|>", [["now", "{}"], ["now", "{}"]]),
    ("olmo3", '<function_calls>\nweather(city="x")\nnow()\n</function_calls>', [["weather", '{"city": "x"}'],
                                                                               ["now", "{}"]]),
    ("granite4", HERMES, [["weather", ARGUMENTS]]),
    ("longcat", f"<longcat_tool_call>{call('now')}</longcat_tool_call>", [["now", "{}"]]),
    ("hunyuan_a13b", f"<tool_calls>\n[\n{call('now')}\n]\n</tool_calls>", [["now", "{}"]]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_calls_are_found_in_a_whole_text(name: str, text: str, expected: list[Any]) -> None:
    assert told(reader_of(name), [text]) == expected


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CASES), st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_calls_are_found_whatever_the_pieces(case: tuple[str, str, list[Any]], sizes: list[int]) -> None:
    name, text, expected = case
    assert told(reader_of(name), pieces_of(text, sizes)) == expected


def scraps(markers: tuple[str, ...]) -> st.SearchStrategy[str]:
    """Text of a family's markers, whole and cut, in every order, with bits of calls between."""
    bits = ['{"name": "now", "arguments": {"a": [1]}}', '{"name": "weather"', ', "parameters": {}}', "{}", "{", "}",
            "[", "]", "now", "functions.now:0", "function", "```json\n", "```", '"', "\\", "\n", " ", ",", "<", "é",
            "x" * 40, "<function=now>", "</function>", "<parameter=a>", "</parameter>", "[CALL_ID]x[ARGS]",
            "now(", ")", "'", "a=1", "now(a='x')", "weather("]  # fmt: skip
    cut = [marker[: len(marker) // 2] for marker in markers]
    return st.lists(st.sampled_from([*bits, *markers, *markers, *cut]), max_size=14).map("".join)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_whatever_a_model_says_its_pieces_mean_what_the_whole_means(name: str) -> None:
    @settings(max_examples=60, deadline=None)
    @given(scraps(TOOL_FORMATS[name].markers), st.lists(st.integers(1, 9), min_size=1, max_size=12))
    def examine(text: str, sizes: list[int]) -> None:
        whole = told(reader_of(name), [text])
        assert told(reader_of(name), pieces_of(text, sizes)) == whole
        assert told(reader_of(name), list(text)) == whole

    examine()


@pytest.mark.parametrize("name", REASONING_FORMATS)
def test_whatever_a_thinking_model_says_its_pieces_mean_what_the_whole_means(name: str) -> None:
    form = REASONING_FORMATS[name]
    tags = (form.begin, form.end, *(form.answer or ()))

    @settings(max_examples=60, deadline=None)
    @given(scraps(tags), st.sampled_from(["before", "inside", "after"]))
    def examine(text: str, stage: Stage) -> None:
        assert told(thinking(name, stage), list(text)) == told(thinking(name, stage), [text])
        assert told(thinking(name, stage, reader_of("hermes")), list(text)) == told(
            thinking(name, stage, reader_of("hermes")), [text]
        )

    examine()


def pieces_of(text: str, sizes: list[int]) -> list[str]:
    pieces, at = [], 0
    while at < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[at : at + size])
        at += size
    return pieces


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"integer", "null"}),
        ({"$ref": "#/$defs/p", "$defs": {"p": {"properties": {}}}}, {"object"}),
        ({"$ref": "#/$defs/p", "$defs": {"p": {"anyOf": [{"$ref": "#/$defs/p"}]}}}, {"string"}),
        ({"enum": ["a", 1, None, True, [], {}]}, {"string", "number", "null", "boolean", "array", "object"}),
        ({"const": 2}, {"number"}),
        ({"allOf": [{"items": {}}]}, {"array"}),
        ({"$ref": "http://elsewhere"}, {"string"}),
    ],
)
def test_a_schema_tells_what_kinds_of_values_there_may_be(schema: dict[str, Any], expected: set[str]) -> None:
    assert kinds(schema) == expected


def test_values_in_tags_are_read_as_their_schema_means_them() -> None:
    optional = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    properties = {"a": optional, "b": {"$ref": "#/$defs/p"}, "c": {"type": ["string", "null"]}}
    schema = {"type": "object", "properties": properties, "$defs": {"p": {"type": "object"}}}
    use = ToolUse((), (FunctionDefinition(name="f", parameters=schema),))
    text = "<tool_call>f<arg_key>{}</arg_key><arg_value>{}</arg_value></tool_call>"
    for key, value, expected in [("a", "3", 3), ("a", "null", None), ("b", '{"x": 1}', {"x": 1}), ("c", "3", "3"),
                                 ("c", "null", None)]:  # fmt: skip
        ((_, arguments),) = told(TOOL_FORMATS["glm47"].reader(use, ids()), [text.format(key, value)])
        assert json.loads(arguments) == {key: expected}


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_a_family_reads_what_it_spells(name: str) -> None:
    calls = [("weather", {"city": 'Zü"rich', "days": 2}), ("now", {})]
    if name in ("llama3_json", "llama4_json", "json"):
        calls = calls[:1]
    spelled = TOOL_FORMATS[name].spelled(calls)
    found = told(reader_of(name), [spelled])
    assert [(each[0], json.loads(each[1])) for each in found] == calls


def test_kimis_calls_keep_the_ids_that_its_templates_take_back() -> None:
    section = "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:7<|tool_call_argument_begin|>{}"
    begun, *_ = reader_of("kimi_k2").feed(section)
    assert begun == CallBegun(0, "functions.now:7", "now")


def test_arguments_are_passed_on_before_the_call_is_complete() -> None:
    reader = reader_of("hermes")
    reader.feed('<tool_call>{"name": "weather", "arguments": {"city": "Par')
    assert [part.text for part in reader.feed("is") if isinstance(part, CallArguments)] == ["is"]


def test_text_is_shown_as_soon_as_it_cannot_be_a_marker() -> None:
    reader = reader_of("hermes")
    assert reader.feed("a <tool") == [Content("a")]
    assert reader.feed("s>b") == [Content(" <tools>b")]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("… [TOOL_CALLS] …", "mistral"),
        ("<tool_call>\n<function=…", "qwen3_coder"),
        ("<tools>…<tool_call>", "hermes"),
        ("<tool_call>{name}<arg_key>", "glm45"),
        ("Environment: ipython", "llama3_json"),
        ("<|tool_call|>", "granite"),
        ("<｜tool▁calls▁begin｜>", "deepseek_v31"),
        ("<｜tool▁calls▁begin｜> ```json", "deepseek_v3"),
        ("<|tool_calls_section_begin|>", "kimi_k2"),
        ("<|start|>assistant<|channel|>final<|message|>", "openai"),
        ("no tools here", "hermes"),
    ],
)
def test_a_template_tells_its_format(template: str, name: str) -> None:
    assert detect_tools(template) == name
    assert type(tool_format("auto", template)) is type(TOOL_FORMATS[name])


def test_a_template_that_uses_tools_is_known_by_the_word() -> None:
    assert takes_tools("{% if tools %}") and not takes_tools("{% if toolset %}")


# Thoughts.


def thinking(name: str, stage: Stage, rest: Reader | None = None) -> Reader:
    return REASONING_FORMATS[name].reader(stage, rest)


THOUGHTS: list[tuple[str, Stage, str, list[Any]]] = [
    ("qwen3", "before", "<think>\nHm < so </thin.\n</think>\n\nParis.", [("thought", "Hm < so </thin.\n"), "Paris."]),
    ("qwen3", "before", "\nParis.", ["\nParis."]),
    ("qwen3", "before", "<thi", ["<thi"]),
    ("qwen3", "inside", "Hm.</think>Paris.", [("thought", "Hm."), "Paris."]),
    ("qwen3", "inside", "\nnever ends", [("thought", "never ends")]),
    ("qwen3", "after", "\n\n<think>x", ["<think>x"]),
    ("deepseek_r1", "inside", "</think>\n\n", []),
    ("mistral", "before", "[THINK]a[/THINK]b", [("thought", "a"), "b"]),
    ("ernie45", "inside", "a\n</think>\n\n<response>\nb\n\nc < /r\n</response>\n", [("thought", "a\n"), "b\n\nc < /r"]),
    ("ernie45", "inside", "a\n</think>\nb\n", [("thought", "a\n"), "b\n"]),
    ("hunyuan_a13b", "before", "<think>\na\n</think>\n<answer>\nb\n</answer>", [("thought", "a\n"), "b"]),
    ("hunyuan_a13b", "before", "<think>\n\n</think>\n<answer>\nb\n</answer> c", ["bc"]),
    ("hunyuan_a13b", "before", "<think>a</think><answer>\nb\n</ans", [("thought", "a"), "b\n</ans"]),
    ("hunyuan_a13b", "after", "<answer>\n", []),
    ("step3", "inside", "a</think>b", [("thought", "a"), "b"]),
    ("openai_gptoss", "before", "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b",
     [("thought", "a"), "b"]),
    ("openai_gptoss", "inside", "a<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>{}<|return|>",
     [("thought", "a"), "{}"]),
    ("openai_gptoss", "after", "b<|return|>", ["b"]),
    ("qwen3", "before", f"<think>\nI call.\n</think>\n\n{HERMES}", [("thought", "I call.\n"), ["weather", ARGUMENTS]]),
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(THOUGHTS), st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_thoughts_are_told_from_answers_whatever_the_pieces(
    case: tuple[str, Stage, str, list[Any]], sizes: list[int]
) -> None:
    name, stage, text, expected = case
    assert told(thinking(name, stage, reader_of("hermes")), pieces_of(text, sizes)) == expected
    if "tool_call" not in text:
        assert told(thinking(name, stage), pieces_of(text, sizes)) == expected


@pytest.mark.parametrize(
    ("name", "prompt", "continues", "stage"),
    [
        ("qwen3", "<|im_start|>assistant\n", False, "before"),
        ("openai_gptoss", "<|start|>assistant", False, "before"),
        ("openai_gptoss", "<|start|>assistant<|channel|>analysis<|message|>", False, "inside"),
        ("openai_gptoss", "<|start|>assistant<|channel|>final<|message|>", False, "after"),
        ("openai_gptoss", "<|channel|>analysis<|message|>a<|end|>…<|channel|>final<|message|>Par", True, "after"),
        ("qwen3", "assistant\n<think>\n", False, "inside"),
        ("qwen3", "assistant\n<think>\n\n</think>\n\n", False, "after"),
        ("deepseek_r1", "<|Assistant|>", False, "inside"),
        ("deepseek_r1", "<|Assistant|><think>\n\n</think>\n", False, "after"),
        ("qwen3", "assistant\n<think>\nI was", True, "inside"),
        ("qwen3", "assistant\nThe capital", True, "after"),
    ],
)
def test_the_prompt_says_where_the_answer_begins(name: str, prompt: str, continues: bool, stage: Stage) -> None:
    assert REASONING_FORMATS[name].stage(prompt, continues=continues) == stage


@pytest.mark.parametrize(
    ("template", "name"), [("{% if '</think>' in content %}", "qwen3"), ("[THINK]", "mistral"), ("plain", None)]
)
def test_a_template_tells_whether_its_model_thinks(template: str, name: str | None) -> None:
    assert detect_reasoning(template) == name


def test_only_what_could_become_a_marker_is_held() -> None:
    assert [num_held(text, "</think>") for text in ("", "a", "a<", "a</th", "</think", "<<")] == [0, 0, 1, 4, 7, 1]


SLOW = [
    ("glm45", "<tool_call>weather\n<arg_key>x</arg_value>", "</arg_key><arg_value>"),
    ("glm45", "<tool_call>weather\n<arg_key>", "</arg_key> "),
    ("glm45", "<tool_call>weather\n<arg_key>x</arg_key>", " \n"),
    ("glm45", "<tool_call>", "\n\n"),
    ("qwen3_coder", "<tool_call><function=", "a"),
    ("qwen3_coder", "<tool_call><function=weather>", "\n \n"),
    ("qwen3_coder", "<function=weather><parameter=a></parameter", "<parameter=b>"),
    ("qwen3_coder", "<function=weather><parameter=", "</parameter>"),
    ("mistral", "[TOOL_CALLS] weather", "  "),
    ("mistral", "[TOOL_CALLS]", "a"),
]


@pytest.mark.parametrize(("name", "begin", "again"), SLOW)
def test_a_text_is_read_in_time_whatever_it_repeats(name: str, begin: str, again: str) -> None:
    reader, began = reader_of(name), time.thread_time()
    reader.feed(begin)
    for _ in range(1500):
        reader.feed(again)
    reader.finish()
    assert time.thread_time() - began < 0.5


def test_what_opens_no_call_hides_none_that_follows() -> None:
    call = TOOL_FORMATS["qwen3_coder"].spelled([("weather", {"city": "Rome"})])
    for opening in ("<function=a b>", f"<function={'a' * 400}>", "<tool_call><function= >"):
        text, found = f"See {opening} {call}", [f"See {opening}", ["weather", '{"city": "Rome"}']]
        assert told(reader_of("qwen3_coder"), [text]) == told(reader_of("qwen3_coder"), list(text)) == found


def test_parameters_are_named_with_spaces_too() -> None:
    for name in ("qwen3_coder", "glm45", "hermes"):
        text = TOOL_FORMATS[name].spelled([("weather", {"first name": "x"})])
        assert told(reader_of(name), list(text)) == [["weather", '{"first name": "x"}']]
