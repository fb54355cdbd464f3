"""The official `openai` client, unmodified, against the real stack (strict validation of every answer's shape)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.conftest import MODEL

pytestmark = [pytest.mark.ray, pytest.mark.model]

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


def test_chat_answers_a_question_truthfully(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_chat_equals_the_plain_answer_and_ends_with_usage(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "Write two sentences about the sea."}]
    asked = {"model": MODEL, "messages": question, "temperature": 0, "max_tokens": 48}
    plain = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(c.choices[0].delta.role is None for c in chunks[1:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == plain.choices[0].finish_reason and set(reasons[:-1]) == {None}


def test_a_repeated_prompt_is_served_from_the_prefix_cache(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "Repeat after me: " + "warm gate " * 120}]
    asked = {"model": MODEL, "messages": question, "temperature": 0, "max_tokens": 4}
    client.chat.completions.create(**asked)
    cached = [client.chat.completions.create(**asked).usage.prompt_tokens_details.cached_tokens for _ in range(3)]
    assert max(cached) >= 128


def test_logprobs_are_those_of_the_chosen_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert "".join(t.token for t in content) == answer.choices[0].message.content
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
        assert bytes(token.bytes).decode() == token.token


def test_n_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Invent a name for a boat."}],
        "n": 3,
        "seed": 7,
        "temperature": 1.0,
        "max_tokens": 16,
    }
    first = [c.message.content for c in client.chat.completions.create(**asked).choices]
    second = [c.message.content for c in client.chat.completions.create(**asked).choices]
    assert first == second
    assert len(set(first)) > 1


def test_a_stop_string_cuts_the_answer_exactly(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0, stop=[" is Par"])
    assert answer.choices[0].message.content == "The capital of France"
    assert answer.choices[0].finish_reason == "stop"


def test_completions_take_all_four_kinds_of_prompt(client: openai.OpenAI) -> None:
    text = "The first three letters of the alphabet are"
    root = str(client.base_url).removesuffix("/v1/")
    ids = httpx.post(f"{root}/tokenize", json={"model": MODEL, "prompt": text}, timeout=30).json()["tokens"]
    asked = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    answers = [client.completions.create(prompt=p, **asked) for p in (text, [text], ids, [ids])]
    assert len({a.choices[0].text for a in answers}) == 1
    both = client.completions.create(prompt=[text, "Once upon a time"], **asked)
    assert [c.index for c in both.choices] == [0, 1]
    assert both.choices[0].text == answers[0].choices[0].text


def test_echo_with_logprobs_scores_the_prompt(lenient: openai.OpenAI) -> None:
    answer = lenient.completions.create(
        model=MODEL, prompt="The sky is blue", max_tokens=1, temperature=0, echo=True, logprobs=1
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens) == answer.choices[0].text


def test_concurrent_answers_never_mix(client: openai.OpenAI) -> None:
    def count(start: int) -> str:
        asked = f"{start}, {start + 1}, {start + 2}, {start + 3},"
        made = client.completions.create(model=MODEL, prompt=asked, max_tokens=12, temperature=0)
        return made.choices[0].text

    starts = list(range(10, 34))
    alone = {start: count(start) for start in starts[:6]}
    with ThreadPoolExecutor(12) as pool:
        together = dict(zip(starts, pool.map(count, starts), strict=True))
    assert {start: together[start] for start in alone} == alone


def test_models_are_listed_and_found_by_alias(client: openai.OpenAI) -> None:
    assert MODEL in {m.id for m in client.models.list()}
    assert client.models.retrieve("HuggingFaceTB/SmolLM2-135M-Instruct").id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_a_context_overflow_names_the_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="word " * 9000, max_tokens=5)
    assert caught.value.code == "context_length_exceeded"
    assert "8192" in caught.value.message


class Country(BaseModel):
    name: str = Field(max_length=20)
    capital: str = Field(max_length=20)
    in_europe: bool


def test_structured_output_and_a_required_call(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "Describe France: its name, its capital, whether it is in Europe."}]
    chat = client.chat.completions.parse(model=MODEL, messages=question, response_format=Country, temperature=0)
    assert isinstance(chat.choices[0].message.parsed, Country)
    tool = openai.pydantic_function_tool(Country, name="remember")
    stream = client.chat.completions.create(
        model=MODEL, messages=question, tools=[tool], tool_choice="required", parallel_tool_calls=False, stream=True
    )
    parts = [part for chunk in stream if chunk.choices for part in chunk.choices[0].delta.tool_calls or []]
    assert parts[0].function is not None and parts[0].function.name == "remember"
    arguments = "".join(part.function.arguments or "" for part in parts if part.function)
    assert Country.model_validate_json(arguments)


def test_a_grammar_that_would_kill_an_engine_kills_nobody(client: openai.OpenAI) -> None:
    deep: dict[str, object] = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(1500)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**deep, "d1500": {"type": "integer"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=FRANCE, extra_body={"guided_json": schema})
    assert caught.value.code == "grammar_too_complex"
    assert client.chat.completions.create(model=MODEL, messages=FRANCE, max_tokens=2).choices
