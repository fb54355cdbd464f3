"""Unmodified clients that want more than text: the official SDK's parse and stream helpers, langchain's tools and
structured output; against the sim engine, and a few against SmolLM2."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from configs.grammars.guard import GrammarGuard
from configs.schema import EngineConfig, ModelConfig
from configs.tokenizer import ModelFiles
from gateway.api.tools.families import TOOL_FORMATS
from gateway.app import build_app
from gateway.grammar_check import GrammarCheck
from replicas.detokenize import TextEngine
from replicas.local import LocalEngine
from tests.gateway.listening import listening
from tests.gateway.scripted import Options, Served, serve
from tests.gateway.structured_kit import TOOLS_TEMPLATE, EngineDispatcher, engine_gateway
from tests.gateway.test_clients import HI, langchain, sdk


class Step(BaseModel):
    what: str = Field(max_length=8)
    cost: float | None


class Plan(BaseModel):
    steps: list[Step] = Field(max_length=3)
    mood: Literal["good", "bad"]
    minutes: int


class weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    days: int


async def test_the_sdks_parse_helper_gets_an_object() -> None:
    async with engine_gateway(TOOLS_TEMPLATE) as served, listening(served) as port, sdk(port) as client:
        for seed in range(3):
            chat = await client.chat.completions.parse(model="sim", messages=HI, response_format=Plan, seed=seed)
            assert isinstance(chat.choices[0].message.parsed, Plan)
        tool = openai.pydantic_function_tool(weather)
        chat = await client.chat.completions.parse(
            model="sim", messages=HI, tools=[tool], tool_choice="required", seed=2
        )
        for call in chat.choices[0].message.tool_calls or []:
            assert isinstance(call.function.parsed_arguments, weather)
        assert chat.choices[0].finish_reason == "tool_calls"


async def test_the_sdks_stream_helper_follows_objects_and_calls() -> None:
    async with engine_gateway(TOOLS_TEMPLATE) as served, listening(served) as port, sdk(port) as client:
        async with client.chat.completions.stream(model="sim", messages=HI, response_format=Plan, seed=1) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_completion()
        assert "content.delta" in kinds and isinstance(final.choices[0].message.parsed, Plan)
        options: dict[str, Any] = {"tools": [openai.pydantic_function_tool(weather)], "tool_choice": "required"}
        async with client.chat.completions.stream(
            model="sim", messages=HI, seed=3, parallel_tool_calls=False, **options
        ) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_completion()
        assert "tool_calls.function.arguments.delta" in kinds
        (call,) = final.choices[0].message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, weather)


class Place(BaseModel):
    city: Literal["Paris", "Rome"]
    at: tuple[int, int] | None


class trip(BaseModel):
    """A trip."""

    start: Place
    stops: list[Place] = Field(max_length=2)
    kind: Literal["short", "long"]
    days: int | None


@pytest.mark.parametrize("name", TOOL_FORMATS)
async def test_nested_arguments_are_what_they_were_declared_in_every_format(name: str) -> None:
    tool = openai.pydantic_function_tool(trip)
    async with (
        engine_gateway(TOOLS_TEMPLATE, tool_call_parser=name) as served,
        listening(served) as port,
        sdk(port) as client,
    ):
        chat = await client.chat.completions.parse(
            model="sim", messages=HI, tools=[tool], tool_choice="required", parallel_tool_calls=False, seed=1
        )
    (call,) = chat.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, trip)


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"structured_outputs": {"choice": ["red", "green"]}}, "red|green"),
        ({"structured_outputs": {"grammar": 'root ::= "x" [0-9] "y"'}}, r"x\dy"),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, "true|false"),
        ({"guided_choice": ["red", "green"]}, "red|green"),
        ({"guided_json": {"enum": [1, 22]}, "guided_decoding_backend": "xgrammar"}, "1|22"),
        ({"response_format": {"type": "json_object"}}, r"\{[\s\S]*\}"),
    ],
)
async def test_vllms_fields_go_through_the_sdk_whole_and_streamed(body: dict[str, Any], pattern: str) -> None:
    async with engine_gateway() as served, listening(served) as port, sdk(port) as client:
        asked: dict[str, Any] = {"model": "sim", "messages": HI, "seed": 4, "extra_body": body}
        text = (await client.chat.completions.create(**asked)).choices[0].message.content
        stream = await client.chat.completions.create(**asked, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert text is not None and re.fullmatch(pattern, text), text
    assert "".join(parts) == text


async def test_a_refused_schema_is_a_bad_request_to_the_sdk() -> None:
    broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "object"}}}
    async with engine_gateway() as served, listening(served) as port, sdk(port) as client:
        with pytest.raises(openai.BadRequestError, match="additionalProperties") as caught:
            await client.chat.completions.create(model="sim", messages=HI, response_format=broken)
        assert caught.value.param == "response_format"


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
async def test_langchain_gets_structured_output(method: Literal["json_schema", "function_calling"]) -> None:
    async with engine_gateway(TOOLS_TEMPLATE) as served, langchain(served) as options:
        chat = ChatOpenAI(**{**options, "seed": 1, "max_tokens": 900}).with_structured_output(
            Plan, method=method, strict=True
        )
        assert isinstance(await chat.ainvoke("Make a plan"), Plan)


async def test_langchain_binds_tools_whole_and_streamed() -> None:
    async with engine_gateway(TOOLS_TEMPLATE) as served, langchain(served) as options:
        chat = ChatOpenAI(**{**options, "seed": 5, "max_tokens": 900}).bind_tools([weather], tool_choice="any")
        message = await chat.ainvoke("Weather in Paris?")
        assert [weather(**call["args"]) for call in message.tool_calls] and not message.invalid_tool_calls
        total: AIMessageChunk | None = None
        async for chunk in chat.astream("Weather in Paris?"):
            total = chunk if total is None else total + chunk
        assert total is not None and [call["args"] for call in total.tool_calls] == [
            call["args"] for call in message.tool_calls
        ]


# The real engine, with 135 million parameters.


@asynccontextmanager
async def smollm2(files: ModelFiles) -> AsyncIterator[Served]:
    from replicas.engine.engine import native_engine

    assert files.path is not None
    config = EngineConfig(self_check=False, kv_cache_gib=0.2, max_model_len=1024, max_num_seqs=8)
    engine = native_engine(files.path, config, "smollm2")
    checks = GrammarCheck(GrammarGuard())
    served = serve(options=Options(models=(ModelConfig(id="sim", source="smollm2-135m"),), files=files))
    try:
        async with LocalEngine(TextEngine(engine, files.tokenizer)) as local:
            gateway = replace(served.gateway, dispatcher=EngineDispatcher(local), check_grammar=checks)
            yield replace(served, gateway=gateway, app=build_app(gateway))
    finally:
        checks.close()


class Country(BaseModel):
    name: str = Field(max_length=20)
    capital: str = Field(max_length=20)
    population: int
    in_europe: bool


@pytest.mark.model
async def test_a_model_of_135_million_parameters_always_gives_what_was_asked_for(smollm2_files: ModelFiles) -> None:
    question: list[Any] = [{"role": "user", "content": "Describe France: its name, capital, population."}]
    asked: list[Any] = [{"role": "user", "content": "What is the weather in Rome for 3 days?"}]
    async with smollm2(smollm2_files) as served, listening(served) as port, sdk(port, timeout=120) as client:
        for temperature in (0.0, 1.0):
            chat = await client.chat.completions.parse(
                model="sim", messages=question, response_format=Country, temperature=temperature, seed=7
            )
            assert isinstance(chat.choices[0].message.parsed, Country)
        chosen = await client.chat.completions.create(
            model="sim",
            messages=question,
            temperature=0,
            extra_body={"structured_outputs": {"choice": ["Paris", "Rome"]}},
        )
        assert chosen.choices[0].message.content in ("Paris", "Rome")
        tool = openai.pydantic_function_tool(weather)
        called = await client.chat.completions.parse(
            model="sim", messages=asked, tools=[tool], tool_choice="required", parallel_tool_calls=False, temperature=0
        )
        (call,) = called.choices[0].message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, weather)
