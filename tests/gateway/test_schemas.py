"""Every chunk of every kind of stream, and the cards of models, by OpenAI's published schemas."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.openai_schema import completion_chunk_problems, problems
from tests.gateway.scripted import serve
from tests.gateway.sse_reader import events

HI = {"model": "sim", "messages": [{"role": "user", "content": "hi"}]}
PROMPT = {"model": "sim", "prompt": "abc"}
USAGE = {"include_usage": True}
CONTINUOUS = {"include_usage": True, "continuous_usage_stats": True}

CHAT_FIELDS: list[dict[str, Any]] = [
    {},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 3},
    {"n": 3},
    {"stream_options": USAGE},
    {"stream_options": CONTINUOUS},
    {"n": 2, "logprobs": True, "top_logprobs": 20, "stream_options": USAGE, "return_token_ids": True, "stop": "x"},
]
TEXT_FIELDS: list[dict[str, Any]] = [
    {},
    {"logprobs": 0},
    {"logprobs": 5},
    {"n": 3},
    {"echo": True},
    {"prompt": ["a", "b"], "n": 2},
    {"stream_options": USAGE},
    {"stream_options": CONTINUOUS},
    {"n": 2, "logprobs": 2, "stream_options": USAGE, "return_token_ids": True, "stop": "x"},
]


async def streamed(path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks before `[DONE]`."""
    async with serve().client() as client:
        answer = await client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    *chunks, done = events(answer.text)
    assert done == "[DONE]" and chunks
    return chunks


@pytest.mark.parametrize("fields", CHAT_FIELDS)
async def test_every_chunk_of_a_chat_is_what_openai_specifies(fields: dict[str, Any]) -> None:
    chunks = await streamed("/v1/chat/completions", {**HI, **fields})
    for chunk in chunks:
        assert problems(chunk, "CreateChatCompletionStreamResponse") == [], chunk
    finished = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(choice["index"] for choice in finished) == list(range(fields.get("n", 1)))
    assert ("usage" in chunks[0]) == ("stream_options" in fields)


@pytest.mark.parametrize("fields", TEXT_FIELDS)
async def test_every_chunk_of_a_completion_is_what_openai_specifies(fields: dict[str, Any]) -> None:
    chunks = await streamed("/v1/completions", {**PROMPT, **fields})
    for chunk in chunks:
        assert completion_chunk_problems(chunk) == [], chunk
    finished = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    num_prompts = len(fields["prompt"]) if "prompt" in fields else 1
    assert sorted(choice["index"] for choice in finished) == list(range(num_prompts * fields.get("n", 1)))
    assert ("usage" in chunks[0]) == ("stream_options" in fields)


async def test_an_echoed_prompt_differs_from_the_schema_only_where_its_first_token_has_no_logprob() -> None:
    first, *others = await streamed("/v1/completions", {**PROMPT, "echo": True, "logprobs": 1})
    assert [problem.split(":")[0] for problem in completion_chunk_problems(first)] == [
        "$.choices[0].logprobs.token_logprobs[0]",
        "$.choices[0].logprobs.top_logprobs[0]",
    ]
    assert all(completion_chunk_problems(chunk) == [] for chunk in others)


async def test_models_are_what_openai_specifies_alone_and_listed() -> None:
    async with serve().client() as client:
        listed = (await client.get("/v1/models")).json()
        assert problems(listed, "ListModelsResponse") == []
        for card in listed["data"]:
            alone = (await client.get(f"/v1/models/{card['id']}")).json()
            assert problems(alone, "Model") == []
            assert alone == card


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": []},
        {"id": "a", "created": 1, "model": "m", "object": "chat.completion.chunk", "choices": [{"index": 0}]},
        {"id": "a", "created": 1, "model": "m", "object": "chat.completion.chunk", "choices": [], "usage": {}},
    ],
)
def test_the_schema_does_find_what_is_wrong(chunk: dict[str, Any]) -> None:
    assert problems(chunk, "CreateChatCompletionStreamResponse")
