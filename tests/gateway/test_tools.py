"""Tools over HTTP: what the model is told, what it may say, what clients are shown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jsonschema
import msgspec
import pytest

from configs.schema import ModelConfig, ReasoningParser, ToolCallParser
from configs.tokenizer import ModelFiles, load_model_files
from gateway.api.reasoning import REASONING_FORMATS
from gateway.api.speech import Speech
from gateway.api.tools.families import TOOL_FORMATS
from gateway.prompt import Prompter
from replicas.contract import StepDelta
from tests.gateway.openai_schema import problems
from tests.gateway.scripted import FACTS, Options, Served, serve, token_logprob
from tests.gateway.sse_reader import events
from tests.gateway.structured_kit import THINKING_TEMPLATE, TOOLS_TEMPLATE, engine_gateway

CHAT = "/v1/chat/completions"
HI = {"model": "sim", "messages": [{"role": "user", "content": "hi"}]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>'


def said(text: str, template: str = TOOLS_TEMPLATE, finish: str = "stop", **model: Any) -> Served:
    """A gateway whose model says `text`, a character at a time."""

    def script(job: Any) -> Iterable[StepDelta]:
        for char in text:
            ids = tuple(char.encode())
            scored = tuple(token_logprob(t, 0) for t in ids) if job.sampling.logprobs is not None else None
            yield StepDelta(job.request_id, token_ids=ids, text=char, logprobs=scored)
        yield StepDelta(job.request_id, finish_reason=finish)

    files = replace(load_model_files("sim:bytes", Path()), chat_template=template)
    facts = msgspec.structs.replace(FACTS, structured=True, max_model_len=4096)
    named = ModelConfig(id="sim", source="sim:bytes", **model)
    return serve(script, Options(models=(named,), files=files, facts=facts))


async def post(served: Served, **body: Any) -> Any:
    async with served.client() as client:
        return await client.post(CHAT, json={**HI, **body})


async def whole(served: Served, **body: Any) -> Any:
    answer = await post(served, **body)
    assert answer.status_code == 200, answer.text
    assert problems(answer.json(), "CreateChatCompletionResponse") == []
    return answer.json()["choices"][0]


async def streamed(served: Served, **body: Any) -> tuple[dict[str, Any], str, list[dict[str, Any]]]:
    """The message that the stream adds up to, as OpenAI's clients add; its finish reason; the deltas."""
    *chunks, done = events((await post(served, stream=True, **body)).text)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    calls: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        assert problems(chunk, "CreateChatCompletionStreamResponse") == []
    for delta in deltas:
        for name in ("content", "reasoning", "reasoning_content"):
            if delta.get(name):
                message[name] = (message.get(name) or "") + delta[name]
        for part in delta.get("tool_calls", []):
            if "id" in part:
                assert part["index"] == len(calls) and part["type"] == "function"
                calls[part["index"]] = {**part, "function": {**part["function"]}}
                del calls[part["index"]]["index"]
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    if calls:
        message["tool_calls"] = list(calls.values())
    elif message["content"] is None:
        message["content"] = ""
    return message, chunks[-1]["choices"][0]["finish_reason"], deltas


def prompt_of(served: Served) -> str:
    return bytes(b for b in served.dispatcher.jobs[-1].prompt[::4]).decode("latin-1")


# What clients are shown.


@pytest.mark.parametrize(
    "text", [CALL, f"I look.\n{CALL}\n{CALL}", "No call <tool", "<tool_call>broken</tool_call>", CALL[:-20], ""]
)
async def test_a_stream_adds_up_to_the_whole_answer(text: str) -> None:
    choice = await whole(said(text), tools=TOOLS)
    message, finish_reason, _ = await streamed(said(text), tools=TOOLS)
    assert message == choice["message"] and finish_reason == choice["finish_reason"]


async def test_a_call_is_shown_as_openai_shows_it() -> None:
    choice = await whole(said(CALL), tools=TOOLS)
    (call,) = choice["message"]["tool_calls"]
    assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"
    assert call["id"].startswith("call_") and call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Paris", "days": 3}'}
    _, _, deltas = await streamed(said(CALL), tools=TOOLS)
    parts = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert parts[0]["function"] == {"name": "weather", "arguments": ""}
    assert len(parts) > 5 and all(set(part) == {"index", "function"} for part in parts[1:])


async def test_an_answer_cut_off_within_a_call_says_so() -> None:
    choice = await whole(said(CALL[:-20], finish="length"), tools=TOOLS)
    assert choice["finish_reason"] == "length"
    assert not choice["message"]["tool_calls"][0]["function"]["arguments"].endswith("}")


async def test_a_function_that_the_client_named_ends_with_stop() -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for body in ({"tool_choice": named}, {"tool_choice": named, "parallel_tool_calls": True}):
        choice = await whole(said(CALL), tools=TOOLS, **body)
        assert choice["finish_reason"] == "stop" and len(choice["message"]["tool_calls"]) == 1


async def test_without_tools_or_with_the_choice_none_calls_are_text() -> None:
    for body in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        served = said(CALL)
        choice = await whole(served, **body)
        assert choice["message"]["content"] == CALL and "tool_calls" not in choice["message"]
        assert "weather" not in prompt_of(served)


async def test_logprobs_and_token_ids_of_calls_are_whole() -> None:
    body = {"tools": TOOLS, "logprobs": True, "return_token_ids": True}
    choice = await whole(said(f"So {CALL}"), **body)
    *chunks, _ = events((await post(said(f"So {CALL}"), stream=True, **body)).text)
    choices = [chunk["choices"][0] for chunk in chunks]
    content = [entry for each in choices if each["logprobs"] for entry in each["logprobs"]["content"]]
    assert content == choice["logprobs"]["content"]
    assert [t for each in choices for t in each.get("token_ids", [])] == list(f"So {CALL}".encode())


async def test_every_choice_has_its_own_calls_and_ids() -> None:
    answer = (await post(said(f"{CALL}\n{CALL}"), tools=TOOLS, n=3)).json()
    ids = [call["id"] for choice in answer["choices"] for call in choice["message"]["tool_calls"]]
    assert len(ids) == len(set(ids)) == 6


# What the model is told.


async def test_a_template_is_given_the_tools_and_arguments_as_objects() -> None:
    served = said("ok")
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": {
            "name": "weather", "arguments": '{"city": "Paris"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
    ]  # fmt: skip
    await whole(served, tools=TOOLS, messages=messages)
    prompt = prompt_of(served)
    assert '{"type": "function", "function": {"name": "weather", "description"' in prompt
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>' in prompt
    assert "tool\nsunny" in prompt


async def test_a_template_that_takes_arguments_as_text_alone_is_given_text() -> None:
    template = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + '|' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    served = said("ok", template)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]
    await whole(served, tools=TOOLS, messages=messages)
    assert prompt_of(served).endswith('hiweather|{"city":"Paris"}')


async def test_a_template_without_tools_is_told_in_words() -> None:
    plain = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    served = said(CALL, template=plain)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Wait.", "tool_calls": [
            {"id": "c1", "function": {"name": "now", "arguments": ""}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]  # fmt: skip
    choice = await whole(served, tools=TOOLS, messages=messages)
    prompt = prompt_of(served)
    assert prompt.startswith("[system]Be brief.\n\n") and prompt.count("[system]") == 1
    assert '{"name": "weather", "description": "The weather of a city."' in prompt
    assert '[assistant]Wait.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>' in prompt
    assert prompt.endswith("[user]<tool_response>\nnoon\n</tool_response>")
    assert choice["finish_reason"] == "tool_calls"
    await whole(served, tools=TOOLS)
    assert prompt_of(served).startswith("[system]There are functions")


async def test_tokenize_counts_the_tools_too() -> None:
    served = said("")
    async with served.client() as client:
        counts = [
            (await client.post("/tokenize", json={**HI, **more})).json()["count"]
            for more in ({}, {"tools": [NOW]}, {"tools": TOOLS})
        ]
    assert counts[0] < counts[1] < counts[2]


async def test_a_model_that_calls_nothing_says_so() -> None:
    answer = await post(said("", tool_call_parser="none"), tools=TOOLS)
    assert answer.json()["error"]["code"] == "unsupported_parameter"


# What the model may say.


@pytest.mark.parametrize("name", TOOL_FORMATS)
async def test_a_required_call_is_made_in_every_format(name: str) -> None:
    async with engine_gateway(TOOLS_TEMPLATE, tool_call_parser=name) as served:
        for seed, parallel in ((1, False), (2, False), (3, True)):
            choice = await whole(
                served, tools=TOOLS, tool_choice="required", parallel_tool_calls=parallel, seed=seed, max_tokens=1500
            )
            calls = choice["message"]["tool_calls"]
            assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None, choice
            assert parallel or len(calls) == 1
            for call in calls:
                arguments = json.loads(call["function"]["arguments"])
                if call["function"]["name"] == "weather":
                    jsonschema.validate(arguments, WEATHER["function"]["parameters"])
                else:
                    assert call["function"]["name"] == "now" and arguments == {}


@pytest.mark.parametrize(
    "wrong", [{"properties": None}, {"properties": [1]}, {"required": 5}, {"required": [1]}, {"required": [["city"]]}]
)
@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "glm45", "pythonic"])
async def test_parameters_of_another_form_are_refused(name: str, wrong: dict[str, Any]) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, **wrong}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    for body in ({"tool_choice": "required"}, {}):
        answer = await post(said("", tool_call_parser=name), tools=[tool], **body)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_function_parameters"


async def test_a_function_allowed_twice_is_one() -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}] * 1000}
    served = said(CALL)
    await whole(served, tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    constraint = served.dispatcher.jobs[-1].sampling.constraint
    assert constraint is not None and constraint.source.num_bytes < 1000


async def test_the_named_function_is_called_and_no_other() -> None:
    async with engine_gateway(TOOLS_TEMPLATE) as served:
        for name in ("weather", "now"):
            choice = await whole(
                served, tools=TOOLS, tool_choice={"type": "function", "function": {"name": name}}, seed=4
            )
            assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == [name]
        allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
        choice = await whole(
            served, tools=TOOLS, seed=4, parallel_tool_calls=False,
            tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
        )  # fmt: skip
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["now"]
        assert '"weather"' in prompt_of(served), "it is told of all"


@pytest.mark.parametrize("name", ["hermes", "mistral", "llama3_json", "qwen3_coder"])
async def test_strict_functions_constrain_calls_but_not_the_text_before_them(name: str) -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    async with engine_gateway(TOOLS_TEMPLATE, tool_call_parser=name) as served:
        choice = await whole(served, tools=[strict], seed=2, max_tokens=60)
        assert choice["message"]["content"], "the model says what it likes"
        constraint = served.dispatcher.jobs[-1].sampling.constraint
        assert constraint is not None and constraint.param == "tools"
    assert (await whole(said("free"), tools=[WEATHER]))["message"]["content"] == "free"


async def test_an_answer_that_is_no_call_follows_the_response_format() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no"]}}}
    async with engine_gateway(TOOLS_TEMPLATE) as served:
        seen = set()
        for seed in range(8):
            message = (await whole(served, tools=[NOW], response_format=wanted, seed=seed))["message"]
            seen.add("call" if "tool_calls" in message else json.loads(message["content"]))
    assert seen <= {"call", "yes", "no"} and len(seen) > 1
    answer = await post(said(""), tools=[NOW], guided_regex="a")
    assert answer.status_code == 400 and "cannot be combined with 'tools'" in answer.json()["error"]["message"]


async def test_a_marker_that_is_a_special_token_stays_visible_and_is_enforced() -> None:
    files = special_files("[TOOL_CALLS]")
    speech = Speech.of(ModelConfig(id="sim", source="sim:bytes"), Prompter(files))
    assert speech.spell("[TOOL_CALLS]") == "<[259]>" and speech.spell("[ARGS]") == '"[ARGS]"'
    facts = msgspec.structs.replace(FACTS, structured=True, vocab_size=300)
    text = '[TOOL_CALLS][{"name": "now", "arguments": {}}]'

    def script(job: Any) -> Iterable[StepDelta]:
        yield StepDelta(job.request_id, token_ids=(259,), text=text, finish_reason="stop")

    served = serve(script, Options(models=(ModelConfig(id="sim", source="sim:bytes"),), files=files, facts=facts))
    choice = await whole(served, tools=[NOW], tool_choice="required")
    (call,) = choice["message"]["tool_calls"]
    assert len(call["id"]) == 9 and call["id"].isalnum(), "Mistral's templates take no others"
    sampling = served.dispatcher.jobs[0].sampling
    assert not sampling.skip_special_tokens
    assert sampling.constraint is not None and "calls: <[259]>" in sampling.constraint.source.text


def special_files(token: str) -> ModelFiles:
    files = load_model_files("sim:bytes", Path())
    files.tokenizer.add_special_tokens([token])
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}[TOOL_CALLS]{% endif %}"
    return replace(files, chat_template=template)


# Thoughts.

THOUGHT = "<think>\nThe user greets me.\n</think>\n\nHello!"


async def test_thoughts_have_their_own_field_whole_and_streamed() -> None:
    choice = await whole(said(THOUGHT, THINKING_TEMPLATE))
    message, finish_reason, deltas = await streamed(said(THOUGHT, THINKING_TEMPLATE))
    assert choice["message"] == message
    assert (message["content"], message["reasoning"]) == ("Hello!", "The user greets me.\n")
    assert message["reasoning_content"] == message["reasoning"] and finish_reason == "stop"
    assert all(not (delta.get("content") and delta.get("reasoning")) for delta in deltas)


async def test_thoughts_come_before_calls_and_can_be_left_out() -> None:
    text = f"<think>\nI call.\n</think>\n\n{CALL}"
    message = (await whole(said(text, THINKING_TEMPLATE), tools=TOOLS))["message"]
    assert message["reasoning"] == "I call.\n" and len(message["tool_calls"]) == 1
    silent = (await whole(said(text, THINKING_TEMPLATE), tools=TOOLS, include_reasoning=False))["message"]
    assert "reasoning" not in silent and len(silent["tool_calls"]) == 1
    assert (await streamed(said(text, THINKING_TEMPLATE), include_reasoning=False))[0].get("reasoning") is None


async def test_a_model_told_not_to_think_is_not_read_for_thoughts() -> None:
    body = {"chat_template_kwargs": {"enable_thinking": False}}
    assert (await whole(said(THOUGHT, THINKING_TEMPLATE), **body))["message"]["content"] == THOUGHT
    assert (await whole(said(THOUGHT, THINKING_TEMPLATE, reasoning_parser="none")))["message"]["content"] == THOUGHT


async def test_how_long_to_think_is_told_by_the_template() -> None:
    template = "{{ reasoning_effort or 'as it likes' }}"
    for body, prompt in (
        ({"reasoning_effort": "low"}, "low"),
        ({}, "as it likes"),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}, "high"),
    ):
        served = said("", template)
        await whole(served, **body)
        assert prompt_of(served) == prompt


HARMONY_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if tools %}namespace functions{% endif %}{# <|channel|>final #}<|start|>assistant"
)


async def test_gpt_oss_speaks_in_channels() -> None:
    thought, call = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant", TOOL_FORMATS["openai"]
    text = f"{thought}<|channel|>final<|message|>Paris.<|return|>"
    message = (await whole(said(text, HARMONY_TEMPLATE)))["message"]
    assert (message["reasoning"], message["content"]) == ("Hm.", "Paris.")
    choice = await whole(said(thought + call.spelled([("weather", {"city": "Rome"})]), HARMONY_TEMPLATE), tools=TOOLS)
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert choice["message"]["reasoning"] == "Hm."
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}


async def test_r1_thinks_from_its_first_word() -> None:
    choice = await whole(said("Hm.</think>Hi!", reasoning_parser="deepseek_r1"))
    assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("Hm.", "Hi!")


async def test_earlier_thoughts_reach_the_template() -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.content }}{% endfor %}"
    for name in ("reasoning", "reasoning_content"):
        served = said("", template)
        await whole(served, messages=[{"role": "assistant", "content": "a", name: "b"}])
        assert prompt_of(served) == "b|a"


def test_the_profile_knows_the_formats_that_there_are() -> None:
    assert set(get_args(ToolCallParser)) == {"auto", "none", *TOOL_FORMATS}
    assert set(get_args(ReasoningParser)) == {"auto", "none", *REASONING_FORMATS}
