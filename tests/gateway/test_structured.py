"""Answers of a certain form over HTTP: fields, refusals, who may ask for what."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

import jsonschema
import msgspec
import pytest

from configs.grammars.source import GrammarError, GrammarSource
from configs.schema import TenantConfig
from gateway.api.schema_rules import MAX_DEPTH, strict_problem
from gateway.errors import GrammarTooComplexError, InvalidGrammarError, UnavailableError
from gateway.grammar_check import GrammarCheck
from replicas.contract import Constraint, Fault, StepDelta
from tests.gateway.scripted import FACTS, Options, Served, serve
from tests.gateway.sse_reader import events
from tests.gateway.structured_kit import THINKING_TEMPLATE, engine_gateway

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"model": "sim", "messages": [{"role": "user", "content": "hi"}]}
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
    "required": ["x", "y"],
    "additionalProperties": False,
}


def able() -> Served:
    """A scripted gateway whose engines say that they can follow grammars."""
    return serve(options=Options(facts=msgspec.structs.replace(FACTS, structured=True)))


async def post(served: Served, path: str, **body: Any) -> Any:
    async with served.client() as client:
        return await client.post(path, json=body)


def json_schema(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "point", "schema": schema, **more}}


@pytest.mark.parametrize(
    ("fields", "kind", "text", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "json", '{"type":"object"}', "response_format"),
        ({"response_format": json_schema(POINT)}, "json", json.dumps(POINT, separators=(",", ":")), "response_format"),
        ({"structured_outputs": {"json": '{"type":"null"}'}}, "json", '{"type":"null"}', "structured_outputs.json"),
        ({"structured_outputs": {"json": {"type": "null"}}}, "json", '{"type":"null"}', "structured_outputs.json"),
        ({"structured_outputs": {"json_object": True}}, "json", '{"type":"object"}', "structured_outputs.json_object"),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+", "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a","b"]', "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "grammar", 'root ::= "a"', "structured_outputs.grammar"),
        ({"guided_json": {"type": "null"}}, "json", '{"type":"null"}', "guided_json"),
        ({"guided_regex": "a+", "guided_decoding_backend": "outlines"}, "regex", "a+", "guided_regex"),
        ({"guided_choice": ["a"]}, "choice", '["a"]', "guided_choice"),
        ({"guided_grammar": "g"}, "grammar", "g", "guided_grammar"),
    ],
)
async def test_every_field_becomes_the_constraint_it_means(
    fields: dict[str, Any], kind: str, text: str, param: str
) -> None:
    for path, body in ((CHAT, HI), (TEXT, {"model": "sim", "prompt": "a"})):
        served = able()
        answer = await post(served, path, **body, **fields)
        assert answer.status_code == 200, answer.text
        assert "x-warmgate-ignored-fields" not in answer.headers
        constraint = served.dispatcher.jobs[0].sampling.constraint
        assert constraint is not None
        assert (constraint.source.kind, constraint.source.text, constraint.param) == (kind, text, param)


async def test_a_structural_tag_is_taken_in_both_of_vllms_ways() -> None:
    tag = {"type": "structural_tag", "structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}], "triggers": ["<f"]}
    for fields in ({"response_format": tag}, {"structured_outputs": {"structural_tag": json.dumps(tag)}}):
        served = able()
        assert (await post(served, CHAT, **HI, **fields)).status_code == 200
        constraint = served.dispatcher.jobs[0].sampling.constraint
        assert constraint is not None and constraint.source.kind == "structural_tag"
        assert json.loads(constraint.source.text)["triggers"] == ["<f"]


async def test_white_space_between_tokens_of_json_can_be_chosen() -> None:
    for fields, expected in (
        ({"structured_outputs": {"json": {}, "disable_any_whitespace": True}}, ""),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": " *"}}, " *"),
        ({"guided_json": {}, "guided_whitespace_pattern": "\n?"}, "\n?"),
        ({"guided_json": {}}, GrammarSource(kind="json", text="").whitespace),
    ):
        served = able()
        await post(served, CHAT, **HI, **fields)
        constraint = served.dispatcher.jobs[0].sampling.constraint
        assert constraint is not None and constraint.source.whitespace == expected


async def test_text_is_no_constraint() -> None:
    served = serve()
    assert (await post(served, CHAT, **HI, response_format={"type": "text"})).status_code == 200
    assert served.dispatcher.jobs[0].sampling.constraint is None


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "object"}, "In context=(), 'additionalProperties' is required to be supplied and to be false."),
        (
            {**POINT, "required": ["x"]},
            "In context=(), 'required' is required to be supplied and to be an array including every key in "
            "properties. Missing 'y'.",
        ),
        ({**POINT, "required": ["x", "y", "z"]}, "Extra required key 'z' supplied."),
        (
            {**POINT, "properties": {"x": {"type": "array", "items": {"type": "object"}}, "y": {}}},
            "In context=('properties', 'x', 'items'), 'additionalProperties' is required",
        ),
        ({**POINT, "$defs": {"d": {"type": "object"}}}, "In context=('$defs', 'd'), 'additionalProperties'"),
        ({"type": "array"}, "schema must be a JSON Schema of 'type: \"object\"', got 'type: \"array\"'."),
    ],
)
async def test_a_strict_schema_is_refused_in_openais_words(schema: dict[str, Any], words: str) -> None:
    served = able()
    answer = await post(served, CHAT, **HI, response_format=json_schema(schema, strict=True))
    error = answer.json()["error"]
    assert answer.status_code == 400 and served.dispatcher.jobs == []
    assert error["message"].startswith("Invalid schema for response_format 'point': ") and words in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "response_format", None)
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    error = (await post(served, CHAT, **HI, tools=[tool])).json()["error"]
    assert error["message"].startswith("Invalid schema for function 'f': ") and words in error["message"]
    assert (error["param"], error["code"]) == ("tools[0].function.parameters", "invalid_function_parameters")
    assert (await post(served, CHAT, **HI, response_format=json_schema(schema))).status_code == 200


DEEP: dict[str, Any] = dict(POINT)
for _ in range(MAX_DEPTH):
    DEEP = {"type": "object", "properties": {"a": DEEP}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": json_schema(DEEP)},
        {"response_format": json_schema(DEEP, strict=True)},
        {"structured_outputs": {"json": DEEP}},
        {"guided_json": DEEP},
        {"guided_json": json.dumps(DEEP), "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"guided_json": "[" * 90_000, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]},
        {"response_format": {"type": "structural_tag", "triggers": ["<"], "structures": [
            {"begin": "<", "end": ">", "schema": DEEP}]}},
    ],
)  # fmt: skip
async def test_a_schema_nested_without_end_is_refused_at_once(fields: dict[str, Any]) -> None:
    served = able()
    answer = await post(served, CHAT, **HI, **fields)
    assert answer.status_code == 400 and served.dispatcher.jobs == []
    assert re.search("nested more than 100 levels|recursion", answer.json()["error"]["message"])


def test_strict_rules_are_quick_on_long_schemas() -> None:
    schema = {"type": "object", "additionalProperties": False, "properties": {f"a{i}": True for i in range(20_000)}}
    began = time.thread_time()
    assert "'a0'" in str(strict_problem({**schema, "required": [f"b{i}" for i in range(20_000)]}))
    assert strict_problem({**schema, "required": list(schema["properties"])}) is None  # type: ignore[call-overload]
    assert time.thread_time() - began < 1
    assert "'[1]'" in str(strict_problem({**schema, "required": [*schema["properties"], [1]]}))  # type: ignore[misc]


@pytest.mark.parametrize("place", ["response_format", "guided_json", "tools"])
async def test_a_schema_too_long_for_a_grammar_is_refused_before_it_is_read(place: str) -> None:
    schema = {"type": "object", "properties": {f"a{i}": True for i in range(20_000)}}
    fields: dict[str, Any] = {
        "response_format": {"response_format": json_schema(schema, strict=True)},
        "guided_json": {"guided_json": schema},
        "tools": {
            "tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}],
        },
    }[place]
    error = (await post(able(), CHAT, **{**HI, **fields})).json()["error"]
    assert error["code"] == "grammar_too_complex" and str(error["param"]).startswith(place)


def test_strict_rules_say_what_is_no_schema() -> None:
    assert strict_problem(POINT) is None
    assert "is not of type" in (strict_problem({**POINT, "properties": {"x": 5, "y": {}}}) or "")


async def test_an_engine_that_cannot_follow_grammars_is_not_asked_to() -> None:
    served = serve()
    answer = await post(served, CHAT, **HI, response_format={"type": "json_object"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "response_format", "unsupported_parameter")
    assert "cannot make its answers follow a grammar" in error["message"]


async def test_a_replicas_word_about_a_grammar_reaches_the_client() -> None:
    def script(job: Any) -> list[Any]:
        fault = Fault("grammar_too_complex", "The grammar takes too long to follow.", param="guided_regex")
        begun = StepDelta(job.request_id, token_ids=(65,), text="A")
        return [begun, StepDelta(job.request_id, finish_reason="error", fault=fault)]

    served = serve(script, Options(facts=msgspec.structs.replace(FACTS, structured=True)))
    answer = await post(served, CHAT, **HI, guided_regex="a")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "grammar_too_complex", "guided_regex")
    streamed = events((await post(served, CHAT, **HI, guided_regex="a", stream=True)).text)
    assert streamed[-1]["error"]["code"] == "grammar_too_complex", "told within the stream, and no [DONE]"


# With an engine.


@pytest.mark.parametrize("stream", [False, True])
async def test_json_that_validates_comes_of_any_seed(stream: bool) -> None:
    async with engine_gateway() as served, served.client() as client:
        for seed in range(3):
            body = {**HI, "response_format": json_schema(POINT, strict=True), "seed": seed, "stream": stream}
            answer = await client.post(CHAT, json=body)
            assert answer.status_code == 200, answer.text
            text = said(answer.text) if stream else answer.json()["choices"][0]["message"]["content"]
            jsonschema.validate(json.loads(text), POINT)


def said(stream: str) -> str:
    *chunks, done = events(stream)
    assert done == "[DONE]" and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


async def test_completions_choices_and_lists_of_prompts_follow_it_too() -> None:
    async with engine_gateway() as served, served.client() as client:
        body = {"model": "sim", "prompt": ["a", "b"], "n": 2, "seed": 3, "guided_regex": "[ab]{2}-[0-9]"}
        answer = (await client.post(TEXT, json=body)).json()
        texts = [choice["text"] for choice in answer["choices"]]
        assert len(texts) == 4 and len(set(texts)) > 1
        assert all(re.fullmatch("[ab]{2}-[0-9]", text) for text in texts)
        echoed = (await client.post(TEXT, json={**body, "prompt": "a", "n": 1, "echo": True, "logprobs": 1})).json()
        assert re.fullmatch("a[ab]{2}-[0-9]", echoed["choices"][0]["text"])


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"response_format": json_schema({"type": "objekt"})}, "response_format", "invalid_grammar"),
        ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex", "invalid_grammar"),
        ({"guided_grammar": "root ::= nobody"}, "guided_grammar", "invalid_grammar"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "invalid_grammar"),
        ({"guided_json": {"type": "integer", "multipleOf": 999_983}}, "guided_json", "grammar_too_complex"),
        ({"guided_regex": "a" * 1_000_000}, "guided_regex", "grammar_too_complex"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "$ref": "#/x"}}}],
          "tool_choice": "required"}, "tools", "invalid_grammar"),
    ],
)  # fmt: skip
async def test_a_bad_grammar_is_refused_before_a_replica_hears_of_it(
    fields: dict[str, Any], param: str, code: str
) -> None:
    async with engine_gateway() as served, served.client() as client:
        for _ in range(2):
            answer = await client.post(CHAT, json={**HI, **fields})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error
            assert error["message"].startswith(f"Invalid value for '{param}': ")
        assert served.dispatcher.jobs == []
        assert (await client.post(CHAT, json={**HI, "guided_regex": "ab"})).status_code == 200


async def test_reasoning_is_over_before_the_structure_begins() -> None:
    async with engine_gateway(THINKING_TEMPLATE) as served, served.client() as client:
        body = {**HI, "response_format": json_schema(POINT), "seed": 1, "max_tokens": 40}
        await client.post(CHAT, json=body)
        thinking = served.dispatcher.jobs[-1].sampling.constraint
        silent = {"chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 400}
        answer = await client.post(CHAT, json={**body, **silent})
        jsonschema.validate(json.loads(answer.json()["choices"][0]["message"]["content"]), POINT)
        at_once = served.dispatcher.jobs[-1].sampling.constraint
    assert thinking is not None and at_once is not None
    assert '"<think>"' in thinking.source.preface and at_once.source.preface == ""


# Checking once.


class Guard:
    """Refuses what is written in it; waits until told to go on."""

    def __init__(self) -> None:
        self.checked: list[str] = []
        self.closed = False

    def check(self, source: GrammarSource) -> str:
        self.checked.append(source.text)
        if source.text == "broken":
            raise OSError("no process")
        if source.text != "fine":
            raise GrammarError(f"it is {source.text}", too_complex=source.text == "large")
        return "grammar"

    def close(self) -> None:
        self.closed = True


def wants(text: str) -> Constraint:
    return Constraint(source=GrammarSource(kind="regex", text=text), param="guided_regex")


def check_with(guard: Guard, max_remembered: int = 100) -> GrammarCheck:
    return GrammarCheck(guard, max_remembered)  # type: ignore[arg-type]


async def test_a_verdict_is_remembered_and_the_oldest_forgotten() -> None:
    guard = Guard()
    check = check_with(guard, max_remembered=2)
    for _ in range(2):
        await check(wants("fine"), "a")
        with pytest.raises(InvalidGrammarError, match="Invalid value for 'guided_regex': it is wrong\\."):
            await check(wants("wrong"), "b")
    with pytest.raises(GrammarTooComplexError):
        await check(wants("large"), "a")
    assert guard.checked == ["fine", "wrong", "large"]
    await check(wants("fine"), "a")
    assert guard.checked[3:] == ["fine"]


async def test_one_question_asked_by_many_is_asked_once() -> None:
    guard = Guard()
    check = check_with(guard)
    await asyncio.gather(*(check(wants("fine"), f"tenant-{i % 3}") for i in range(12)))
    assert guard.checked == ["fine"]


async def test_a_tenant_with_many_grammars_waits_in_turn_with_the_others() -> None:
    guard = Guard()
    check = check_with(guard)
    many = [asyncio.create_task(check(wants(f"bad {i}"), "many")) for i in range(9)]
    await asyncio.sleep(0)
    one = asyncio.create_task(check(wants("fine"), "one"))
    await asyncio.gather(*many, one, return_exceptions=True)
    assert guard.checked.index("fine") <= 2


async def test_a_guard_that_cannot_be_started_is_nobodys_fault() -> None:
    guard = Guard()
    check = check_with(guard)
    for _ in range(2):
        with pytest.raises(UnavailableError):
            await check(wants("broken"), "a")
    assert guard.checked == ["broken", "broken"], "not remembered"
    check.close()
    assert guard.closed


# Logprobs of prompts.

TENANTS = (
    TenantConfig(id="root", keys=("root-key",), admin=True),
    TenantConfig(id="user", keys=("user-key",)),
)


async def test_prompt_logprobs_are_for_administrators_and_scoring_for_all() -> None:
    served = serve(options=Options(tenants=TENANTS))
    body = {"model": "sim", "prompt": "abc", "prompt_logprobs": 2}
    score = {"model": "sim", "prompt": [97, 98, 99], "echo": True, "logprobs": 1, "max_tokens": 1}
    async with served.client(authorization="Bearer user-key") as client:
        refused = await client.post(TEXT, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_required")
        assert refused.json()["error"]["param"] == "prompt_logprobs"
        scored = (await client.post(TEXT, json=score)).json()["choices"][0]["logprobs"]
        assert scored["token_logprobs"][0] is None and len(scored["token_logprobs"]) > 3
    async with served.client(authorization="Bearer root-key") as client:
        (choice,) = (await client.post(TEXT, json=body)).json()["choices"]
        first, second, third = choice["prompt_logprobs"]
        assert first is None and choice["logprobs"] is None and choice["text"] == "Hello wörld!"
        assert second == {
            "98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"},
            "99": {"logprob": -1.5, "rank": 2, "decoded_token": "c"},
        }
        assert set(third) == {"99", "100"}
        chat = (await client.post(CHAT, json={**HI, "prompt_logprobs": 0})).json()
        assert chat["prompt_logprobs"][0] is None and len(chat["prompt_logprobs"]) == 21
        assert all(len(position) == 1 for position in chat["prompt_logprobs"][1:])


async def test_scoring_beside_prompt_logprobs_shows_each_as_it_was_asked() -> None:
    served = serve(options=Options(tenants=TENANTS))
    body = {"model": "sim", "prompt": "abc", "prompt_logprobs": 3, "echo": True, "logprobs": 1}
    async with served.client(authorization="Bearer root-key") as client:
        (choice,) = (await client.post(TEXT, json=body)).json()["choices"]
    assert all(len(position) == 3 for position in choice["prompt_logprobs"][1:])
    assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"][1:])
