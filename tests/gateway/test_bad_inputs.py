"""Every bound, refused with its status, type and the name of the field, in OpenAI's body."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.openai_schema import problems
from tests.gateway.scripted import serve

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"model": "sim", "messages": HI, **fields}


def text(**fields: Any) -> tuple[str, dict[str, Any]]:
    return TEXT, {"model": "sim", "prompt": "hi", **fields}


def said(*messages: Any) -> tuple[str, dict[str, Any]]:
    return chat(messages=list(messages))


BAD: list[tuple[tuple[str, dict[str, Any]], str]] = [
    (chat(temperature=-0.1), "temperature"),
    (chat(temperature=2.1), "temperature"),
    (chat(temperature="hot"), "temperature"),
    (chat(top_p=0), "top_p"),
    (chat(top_p=1.01), "top_p"),
    (chat(top_k=-2), "top_k"),
    (chat(top_k=1.5), "top_k"),
    (chat(min_p=-0.1), "min_p"),
    (chat(min_p=1.1), "min_p"),
    (chat(n=0), "n"),
    (chat(n=129), "n"),
    (chat(n=True), "n"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(max_tokens=-5), "max_tokens"),
    (chat(max_tokens="16"), "max_tokens"),
    (chat(max_completion_tokens=0), "max_completion_tokens"),
    (chat(max_tokens=5, max_completion_tokens=6), "max_tokens"),
    (chat(min_tokens=-1), "min_tokens"),
    (chat(min_tokens=9, max_tokens=8), "min_tokens"),
    (chat(stop=""), "stop"),
    (chat(stop=["a", ""]), "stop[1]"),
    (chat(stop=["a", "b", "c", "d", "e"]), "stop"),
    (chat(stop=7), "stop"),
    (chat(stop_token_ids=[-1]), "stop_token_ids[0]"),
    (chat(ignore_eos="yes"), "ignore_eos"),
    (chat(seed=2**63), "seed"),
    (chat(seed=1.5), "seed"),
    (chat(presence_penalty=2.5), "presence_penalty"),
    (chat(frequency_penalty=-2.5), "frequency_penalty"),
    (chat(repetition_penalty=0), "repetition_penalty"),
    (chat(repetition_penalty=2.5), "repetition_penalty"),
    (chat(logit_bias={"5": 101}), "logit_bias[...]"),
    (chat(logit_bias={"5": "x"}), "logit_bias[...]"),
    (chat(logit_bias={"300": 1}), "logit_bias"),
    (chat(logit_bias={"-1": 1}), "logit_bias"),
    (chat(logit_bias={"two": 1}), "logit_bias"),
    (chat(logit_bias=[1]), "logit_bias"),
    (chat(logprobs=3), "logprobs"),
    (chat(top_logprobs=3), "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(logprobs=True, top_logprobs=-1), "top_logprobs"),
    (chat(stream="yes"), "stream"),
    (chat(stream_options={"include_usage": True}), "stream_options"),
    (chat(stream=True, stream_options=[]), "stream_options"),
    (chat(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage"),
    (chat(user=5), "user"),
    (chat(priority="high"), "priority"),
    (chat(cache_salt=""), "cache_salt"),
    (chat(return_token_ids="no"), "return_token_ids"),
    (chat(model=7), "model"),
    (chat(model=None), "model"),
    ((CHAT, {"messages": HI}), "model"),
    ((CHAT, {"model": "sim"}), "messages"),
    (chat(messages=[]), "messages"),
    (chat(messages="hi"), "messages"),
    (said({"content": "hi"}), "messages[0].role"),
    (said({"role": "wizard", "content": "hi"}), "messages[0].role"),
    (said(*HI, {"role": "user"}), "messages[1].content"),
    (said({"role": "user", "content": None}), "messages[0].content"),
    (said({"role": "user", "content": 7}), "messages[0].content"),
    (said({"role": "user", "content": []}), "messages[0].content"),
    (said({"role": "user", "content": [{"text": "hi"}]}), "messages[0].content[0].type"),
    (said({"role": "user", "content": [{"type": "text"}]}), "messages[0].content[0].text"),
    (
        said(
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}],
            }
        ),
        "messages[0].content[1].type",
    ),
    (said({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}), "messages[0].content[0].type"),
    (chat(add_generation_prompt=True, continue_final_message=True), "continue_final_message"),
    (chat(chat_template_kwargs={"messages": "x"}), "chat_template_kwargs.messages"),
    (chat(chat_template_kwargs={"deep": {"er": 1}}), "chat_template_kwargs[...]"),
    (chat(tools=[{"type": "function", "function": {"name": "f"}}]), "tools"),
    (chat(tool_choice="auto"), "tool_choice"),
    (chat(functions=[{"name": "f"}]), "functions"),
    (chat(response_format={"type": "json_object"}), "response_format"),
    (chat(response_format={"type": "json_schema", "json_schema": {}}), "response_format"),
    (chat(modalities=["text", "audio"]), "modalities"),
    (chat(audio={"voice": "alloy"}), "audio"),
    (chat(prediction={"type": "content", "content": "x"}), "prediction"),
    (chat(web_search_options={}), "web_search_options"),
    (chat(structured_outputs={"json": {}}), "structured_outputs"),
    (chat(guided_json={}), "guided_json"),
    (chat(use_beam_search=True), "use_beam_search"),
    (chat(api_base="http://elsewhere"), "api_base"),
    (chat(base_url="http://elsewhere"), "base_url"),
    (chat(chat_template="{{ 1 }}"), "chat_template"),
    (chat(documents=[]), "documents"),
    ((TEXT, {"model": "sim"}), "prompt"),
    (text(prompt=None), "prompt"),
    (text(prompt=""), "prompt"),
    (text(prompt=[]), "prompt"),
    (text(prompt=[[]]), "prompt[0]"),
    (text(prompt=["a", 1]), "prompt"),
    (text(prompt=[1, [2]]), "prompt"),
    (text(prompt=[300]), "prompt"),
    (text(prompt=[-1]), "prompt[0]"),
    (text(prompt=[[1, "a"]]), "prompt[0][1]"),
    (text(prompt={"text": "a"}), "prompt"),
    (text(suffix="end"), "suffix"),
    (text(best_of=0), "best_of"),
    (text(n=3, best_of=2), "best_of"),
    (text(best_of=2, stream=True), "best_of"),
    (text(logprobs=21), "logprobs"),
    (text(logprobs=-1), "logprobs"),
    (text(logprobs=True), "logprobs"),
    (text(echo="yes"), "echo"),
    (text(max_tokens=0, echo=True), "max_tokens"),
    (text(prompt=["a"] * 600, n=2), "prompt"),
    (("/tokenize", {"model": "sim"}), "prompt"),
    (("/tokenize", {"model": "sim", "messages": []}), "messages"),
    (("/tokenize", {"prompt": "a"}), "model"),
    (("/detokenize", {"model": "sim"}), "tokens"),
    (("/detokenize", {"model": "sim", "tokens": [10**6]}), "tokens"),
    (("/detokenize", {"model": "sim", "tokens": "a"}), "tokens"),
]


@pytest.mark.parametrize(("request_", "param"), BAD, ids=[f"{i}-{param}" for i, (_, param) in enumerate(BAD)])
async def test_a_bad_field_is_refused_by_its_name(request_: tuple[str, dict[str, Any]], param: str) -> None:
    served = serve()
    path, body = request_
    async with served.client() as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert param.split("[")[0].split(".")[-1] in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}
    assert problems(answer.json(), "ErrorResponse") == []
    assert served.dispatcher.jobs == []


@pytest.mark.parametrize(
    ("body", "code"),
    [
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
    ],
)
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
    path, body = chat(
        store=True, metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=True, **{"bad\nname": 1}
    )
    async with serve().client() as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == 200
    assert answer.headers["x-warmgate-ignored-fields"] == "metadata, parallel_tool_calls, service_tier, store"


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
    ],
)
async def test_values_that_ask_for_nothing_special_are_taken(neutral: dict[str, Any]) -> None:
    path, body = chat(**neutral)
    async with serve().client() as client:
        assert (await client.post(path, json=body)).status_code == 200


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
