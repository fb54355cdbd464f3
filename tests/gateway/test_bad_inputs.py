"""Every bound, refused with its status, type and the name of the field, in OpenAI's body."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.openai_schema import problems
from tests.gateway.scripted import serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
VOCAB = 300  # the scripted model's; `test_bad_inputs` of the real stack puts its own in its place
HI = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"model": "sim", "messages": HI, **fields}


def text(**fields: Any) -> tuple[str, dict[str, Any]]:
    return TEXT, {"model": "sim", "prompt": "hi", **fields}


def said(*messages: Any) -> tuple[str, dict[str, Any]]:
    return chat(messages=list(messages))


F = {"type": "function", "function": {"name": "f"}}
BAD: list[tuple[tuple[str, dict[str, Any]], str, str | None]] = [
    (chat(temperature=-0.1), "temperature", "invalid_value"),
    (chat(temperature=2.1), "temperature", "invalid_value"),
    (chat(temperature="hot"), "temperature", "invalid_type"),
    (chat(top_p=-0.01), "top_p", "invalid_value"),
    (chat(top_p=1.01), "top_p", "invalid_value"),
    (chat(top_k=-2), "top_k", "invalid_value"),
    (chat(top_k=1.5), "top_k", "invalid_type"),
    (chat(min_p=-0.1), "min_p", "invalid_value"),
    (chat(min_p=1.1), "min_p", "invalid_value"),
    (chat(n=0), "n", "invalid_value"),
    (chat(n=129), "n", "invalid_value"),
    (chat(n=True), "n", "invalid_type"),
    (chat(max_tokens=0), "max_tokens", "invalid_value"),
    (chat(max_tokens=-5), "max_tokens", "invalid_value"),
    (chat(max_tokens="16"), "max_tokens", "invalid_type"),
    (chat(max_completion_tokens=0), "max_completion_tokens", "invalid_value"),
    (chat(max_tokens=5, max_completion_tokens=6), "max_tokens", None),
    (chat(min_tokens=-1), "min_tokens", "invalid_value"),
    (chat(min_tokens=9, max_tokens=8), "min_tokens", None),
    (chat(stop=""), "stop", "invalid_value"),
    (chat(stop=["a", ""]), "stop[1]", "invalid_value"),
    (chat(stop=["a", "b", "c", "d", "e"]), "stop", "invalid_value"),
    (chat(stop=7), "stop", "invalid_type"),
    (chat(stop_token_ids=[-1]), "stop_token_ids[0]", "invalid_value"),
    (chat(ignore_eos="yes"), "ignore_eos", "invalid_type"),
    (chat(seed=2**63), "seed", "invalid_value"),
    (chat(seed=1.5), "seed", "invalid_type"),
    (chat(presence_penalty=2.5), "presence_penalty", "invalid_value"),
    (chat(frequency_penalty=-2.5), "frequency_penalty", "invalid_value"),
    (chat(repetition_penalty=0), "repetition_penalty", "invalid_value"),
    (chat(repetition_penalty=2.5), "repetition_penalty", "invalid_value"),
    (chat(logit_bias={"5": 101}), "logit_bias[...]", "invalid_value"),
    (chat(logit_bias={"5": "x"}), "logit_bias[...]", "invalid_type"),
    (chat(logit_bias={str(VOCAB): 1}), "logit_bias", None),
    (chat(logit_bias={"-1": 1}), "logit_bias", None),
    (chat(logit_bias={"two": 1}), "logit_bias", None),
    (chat(logit_bias=[1]), "logit_bias", "invalid_type"),
    (chat(logprobs=3), "logprobs", "invalid_type"),
    (chat(top_logprobs=3), "top_logprobs", None),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "invalid_value"),
    (chat(logprobs=True, top_logprobs=-1), "top_logprobs", "invalid_value"),
    (chat(stream="yes"), "stream", "invalid_type"),
    (chat(stream_options={"include_usage": True}), "stream_options", None),
    (chat(stream=True, stream_options=[]), "stream_options", "invalid_type"),
    (chat(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage", "invalid_type"),
    (chat(user=5), "user", "invalid_type"),
    (chat(priority="high"), "priority", "invalid_type"),
    (chat(cache_salt=""), "cache_salt", "invalid_value"),
    (chat(return_token_ids="no"), "return_token_ids", "invalid_type"),
    (chat(model=7), "model", "invalid_type"),
    (chat(model=None), "model", "invalid_type"),
    ((CHAT, {"messages": HI}), "model", "missing_required_parameter"),
    ((CHAT, {"model": "sim"}), "messages", "missing_required_parameter"),
    (chat(messages=[]), "messages", "invalid_value"),
    (chat(messages="hi"), "messages", "invalid_type"),
    (said({"content": "hi"}), "messages[0].role", "missing_required_parameter"),
    (said({"role": "wizard", "content": "hi"}), "messages[0].role", "invalid_value"),
    (said(*HI, {"role": "user"}), "messages[1].content", "missing_required_parameter"),
    (said({"role": "user", "content": None}), "messages[0].content", "missing_required_parameter"),
    (said({"role": "user", "content": 7}), "messages[0].content", "invalid_type"),
    (said({"role": "user", "content": []}), "messages[0].content", "invalid_value"),
    (said({"role": "user", "content": [{"text": "hi"}]}), "messages[0].content[0].type", "missing_required_parameter"),
    (
        said({"role": "user", "content": [{"type": "text"}]}),
        "messages[0].content[0].text",
        "missing_required_parameter",
    ),
    (
        said(
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}],
            }
        ),
        "messages[0].content[1].type",
        "unsupported_parameter",
    ),
    (
        said({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}),
        "messages[0].content[0].type",
        "unsupported_parameter",
    ),
    (chat(add_generation_prompt=True, continue_final_message=True), "continue_final_message", None),
    (chat(chat_template_kwargs={"messages": "x"}), "chat_template_kwargs.messages", None),
    (chat(chat_template_kwargs={"deep": {"er": 1}}), "chat_template_kwargs[...]", "invalid_type"),
    (chat(tools=[]), "tools", "invalid_value"),
    (chat(tools=[{"type": "function"}]), "tools[0].function", "missing_required_parameter"),
    (chat(tools=[{"type": "custom", "custom": {"name": "f"}}]), "tools[0].type", "unsupported_parameter"),
    (chat(tools=[{"type": "function", "function": {"name": "f g"}}]), "tools[0].function.name", "invalid_value"),
    (chat(tools=[F, F]), "tools[1].function.name", None),
    (chat(tool_choice="required"), "tool_choice", None),
    (chat(tools=[F], tool_choice="perhaps"), "tool_choice", "invalid_value"),
    (chat(tools=[F], tool_choice={"type": "function", "function": {"name": "g"}}), "tool_choice", "invalid_value"),
    (chat(tools=[F], tool_choice={"type": "custom"}), "tool_choice", "invalid_value"),
    (text(tools=[F]), "tools", "unsupported_parameter"),
    (
        said({"role": "assistant", "tool_calls": [{"id": "1"}]}),
        "messages[0].tool_calls[0].function",
        "missing_required_parameter",
    ),
    (
        said({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}),
        "messages[0].tool_calls[0].function.arguments",
        "invalid_value",
    ),
    (chat(functions=[{"name": "f"}]), "functions", "unsupported_parameter"),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema", "missing_required_parameter"),
    (
        chat(response_format={"type": "json_schema", "json_schema": {}}),
        "response_format.json_schema.name",
        "missing_required_parameter",
    ),
    (
        chat(response_format={"type": "json_schema", "json_schema": {"name": "a b"}}),
        "response_format.json_schema.name",
        "invalid_value",
    ),
    (chat(response_format={"type": "xml"}), "response_format.type", "invalid_value"),
    (chat(response_format={"type": "json_object"}, guided_regex="a"), "guided_regex", None),
    (chat(modalities=["text", "audio"]), "modalities", "unsupported_parameter"),
    (chat(audio={"voice": "alloy"}), "audio", "unsupported_parameter"),
    (chat(prediction={"type": "content", "content": "x"}), "prediction", "unsupported_parameter"),
    (chat(web_search_options={}), "web_search_options", "unsupported_parameter"),
    (chat(structured_outputs={"choice": []}), "structured_outputs.choice", "invalid_value"),
    (chat(structured_outputs={}), "structured_outputs", None),
    (chat(structured_outputs={"regexp": "a"}), "structured_outputs", None),
    (chat(prompt_logprobs=21), "prompt_logprobs", "invalid_value"),
    (text(prompt_logprobs=1, stream=True), "prompt_logprobs", None),
    (chat(use_beam_search=True), "use_beam_search", "unsupported_parameter"),
    (chat(api_base="http://elsewhere"), "api_base", "parameter_not_allowed"),
    (chat(base_url="http://elsewhere"), "base_url", "parameter_not_allowed"),
    (chat(chat_template="{{ 1 }}"), "chat_template", "parameter_not_allowed"),
    (chat(documents=[]), "documents", "parameter_not_allowed"),
    ((TEXT, {"model": "sim"}), "prompt", "missing_required_parameter"),
    (text(prompt=None), "prompt", "invalid_type"),
    (text(prompt=""), "prompt", None),
    (text(prompt=[]), "prompt", "invalid_value"),
    (text(prompt=[[]]), "prompt[0]", "invalid_value"),
    (text(prompt=["a", 1]), "prompt", "invalid_type"),
    (text(prompt=[1, [2]]), "prompt", "invalid_type"),
    (text(prompt=[VOCAB]), "prompt", None),
    (text(prompt=[-1]), "prompt[0]", "invalid_value"),
    (text(prompt=[[1, "a"]]), "prompt[0][1]", "invalid_type"),
    (text(prompt={"text": "a"}), "prompt", "invalid_type"),
    (text(suffix="end"), "suffix", "unsupported_parameter"),
    (text(best_of=-1), "best_of", "invalid_value"),
    (text(best_of=21), "best_of", "invalid_value"),
    (text(n=3, best_of=2), "best_of", None),
    (text(best_of=2, stream=True), "best_of", None),
    (text(logprobs=6), "logprobs", "invalid_value"),
    (text(logprobs=-1), "logprobs", "invalid_value"),
    (text(logprobs=True), "logprobs", "invalid_type"),
    (text(echo="yes"), "echo", "invalid_type"),
    (text(max_tokens=0, echo=True), "max_tokens", "invalid_value"),
    (text(max_tokens=0), "max_tokens", "invalid_value"),
    (text(temperature=2.01), "temperature", "invalid_value"),
    (text(top_p=-1), "top_p", "invalid_value"),
    (text(presence_penalty=-2.01), "presence_penalty", "invalid_value"),
    (text(frequency_penalty=2.01), "frequency_penalty", "invalid_value"),
    (text(n=129), "n", "invalid_value"),
    (text(seed=-(2**63) - 1), "seed", "invalid_value"),
    (text(prompt=["a"] * 600, n=2), "prompt", None),
    (("/tokenize", {"model": "sim"}), "prompt", "missing_required_parameter"),
    (("/tokenize", {"model": "sim", "messages": []}), "messages", "invalid_value"),
    (("/tokenize", {"prompt": "a"}), "model", "missing_required_parameter"),
    (("/detokenize", {"model": "sim"}), "tokens", "missing_required_parameter"),
    (("/detokenize", {"model": "sim", "tokens": [10**6]}), "tokens", None),
    (("/detokenize", {"model": "sim", "tokens": "a"}), "tokens", "invalid_type"),
]


WITHOUT_GRAMMARS: list[tuple[tuple[str, dict[str, Any]], str, str | None]] = [
    (chat(tools=[F], tool_choice="required"), "tools", "unsupported_parameter"),
    (chat(response_format={"type": "json_object"}), "response_format", "unsupported_parameter"),
    (chat(structured_outputs={"json": {}}), "structured_outputs.json", "unsupported_parameter"),
    (text(structured_outputs={"regex": "a"}), "structured_outputs.regex", "unsupported_parameter"),
    (chat(guided_json={}), "guided_json", "unsupported_parameter"),
]
"""Refused where no engine follows grammars, as the scripted one here."""

REFUSED = BAD + WITHOUT_GRAMMARS


@pytest.mark.parametrize(
    ("request_", "param", "code"), REFUSED, ids=[f"{i}-{param}" for i, (_, param, _) in enumerate(REFUSED)]
)
async def test_a_bad_field_is_refused_by_its_name(
    request_: tuple[str, dict[str, Any]], param: str, code: str | None
) -> None:
    served = serve()
    path, body = request_
    async with served.client() as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code), error
    assert param.split("[")[0].split(".")[-1] in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}
    assert problems(answer.json(), "ErrorResponse") == []
    assert served.dispatcher.jobs == []


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (
            said({"role": "usr", "content": "hi"}),
            "'messages[0].role': invalid enum value 'usr', expected one of assistant, developer, system, tool, user.",
        ),
        (chat(tools=[F], tool_choice="perhaps"), "'perhaps', expected one of auto, none, required."),
        (
            chat(response_format={"type": "xml"}),
            "'xml', expected one of json_object, json_schema, structural_tag, text.",
        ),
    ],
)
async def test_a_word_that_is_none_of_a_few_is_told_which_there_are(
    request_: tuple[str, dict[str, Any]], says: str
) -> None:
    path, body = request_
    async with serve().client() as client:
        answer = await client.post(path, json=body)
    assert answer.json()["error"]["message"].endswith(says)


NO_OBJECT: list[tuple[bytes, str]] = [
    (b"", "invalid_json"),
    (b"{", "invalid_json"),
    (b"[]", "invalid_type"),
    (b'"text"', "invalid_type"),
    (b"null", "invalid_type"),
    (b'{"model": "sim"} x', "invalid_json"),
    (b'{"model": NaN}', "invalid_json"),
    (b'{"model": "\xff"}', "invalid_json"),
    (b'{"model": "\\ud800"}', "invalid_json"),
    (b'{"model":' + b"[" * 100_000, "invalid_json"),
    (b'{"unknown":' + b"[" * 500 + b"]" * 500 + b"}", "missing_required_parameter"),
    (b"\x00" * 10, "invalid_json"),
]


@pytest.mark.parametrize(("body", "code"), NO_OBJECT)
async def test_a_body_that_is_no_json_object_is_refused(body: bytes, code: str) -> None:
    async with serve().client() as client:
        answer = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_explicit_nulls_are_fields_left_out(path: str) -> None:
    nulls = dict.fromkeys(
        ["temperature", "top_p", "top_k", "min_p", "n", "max_tokens", "stop", "seed", "logprobs", "logit_bias", "user",
         "stream", "stream_options", "tools", "suffix", "response_format", "chat_template", "best_of", "echo",
         "unknown", "max_completion_tokens", "top_logprobs", "priority", "cache_salt", "presence_penalty"]
    )  # fmt: skip
    given = {"messages": HI} if path == CHAT else {"prompt": "hi"}
    async with serve().client() as client:
        answer = await client.post(path, json={"model": "sim", **nulls, **given})
    assert answer.status_code == 200, answer.text
    assert "x-warmgate-ignored-fields" not in answer.headers


async def test_unknown_fields_are_ignored_and_listed() -> None:
    path, body = chat(store=True, metadata={"a": "b"}, service_tier="auto", **{"bad\nname": 1})
    async with serve().client() as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 200
    assert answer.headers["x-warmgate-ignored-fields"] == "metadata, service_tier, store"


@pytest.mark.parametrize(
    "neutral",
    [
        {"response_format": {"type": "text"}},
        {"tool_choice": "none"},
        {"modalities": ["text"]},
        {"use_beam_search": False},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"top_k": -1},
        {"top_k": 0},
        {"stop": []},
        {"logit_bias": {}},
        {"repetition_penalty": 2},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"top_p": 0},
        {"top_p": 1},
        {"temperature": 2},
        {"n": 128},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"logprobs": True, "top_logprobs": 20},
    ],
)
async def test_values_that_ask_for_nothing_special_are_taken(neutral: dict[str, Any]) -> None:
    path, body = chat(**neutral)
    async with serve().client() as client:
        assert (await client.post(path, json=body)).status_code == 200


@pytest.mark.parametrize(
    "edge", [{"best_of": 0}, {"best_of": 0, "n": 3}, {"best_of": 20}, {"logprobs": 5}, {"top_p": 0}]
)
async def test_the_last_values_within_the_bounds_of_completions_are_taken(edge: dict[str, Any]) -> None:
    path, body = text(**edge)
    async with serve().client() as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == edge.get("n", 1)


@pytest.mark.parametrize(
    ("request_", "numbers"),
    [
        (chat(messages=[{"role": "user", "content": "x" * 600}]), ("512", "619")),
        (chat(max_tokens=500), ("512", "521", "21", "500")),
        (chat(max_completion_tokens=500), ("512", "521", "21", "500")),
        (text(prompt=[7] * 512), ("512",)),
        (text(prompt=["ok", "y" * 513]), ("512", "513")),
        (text(prompt="abc", max_tokens=510), ("512", "513", "3", "510")),
    ],
)
async def test_context_overflow_names_the_numbers(
    request_: tuple[str, dict[str, Any]], numbers: tuple[str, ...]
) -> None:
    path, body = request_
    async with serve().client() as client:
        answer = await client.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == ("messages" if path == CHAT else "prompt")
    for number in numbers:
        assert number in error["message"]
