"""Unmodified clients against a real server: the official SDK with strict validation, langchain, and raw sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAI

from configs.schema import TenantConfig
from gateway.errors import QueueFullError, ReplicaLostError
from replicas.contract import StepDelta
from tests.gateway.listening import listening
from tests.gateway.scripted import Options, Served, Step, serve, spoken

SPOKEN = "Hello wörld!"
HI: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client() -> AsyncIterator[openai.AsyncOpenAI]:
    async with listening(serve()) as port, sdk(port) as connected:
        yield connected


def sdk(port: int, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1",
        api_key="sk-any",
        max_retries=options.pop("max_retries", 0),
        _strict_response_validation=True,
        **options,
    )


def lenient(client: openai.AsyncOpenAI) -> openai.AsyncOpenAI:
    """The same client without strict validation."""
    copy = client.with_options()
    copy._strict_response_validation = False
    return copy


async def test_openai_sdk_reads_a_chat(client: openai.AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(
        model="sim", messages=HI, logprobs=True, top_logprobs=2
    )
    chat = raw.parse()
    assert chat.choices[0].message.content == SPOKEN
    assert chat.usage is not None and chat.usage.prompt_tokens_details is not None
    assert chat.usage.prompt_tokens_details.cached_tokens == 16
    assert chat._request_id == raw.headers["x-request-id"]


async def test_openai_sdk_reads_a_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="sim", messages=HI, stream=True, stream_options={"include_usage": True}, logprobs=True
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == SPOKEN
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 13
    assert chunks[-2].choices[0].finish_reason == "stop"


async def test_openai_sdk_helper_for_streams_accumulates_the_answer(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="sim", messages=HI) as stream:
        async for _event in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == SPOKEN


async def test_openai_sdk_reads_completions_and_models(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="sim", prompt=["a", "b"], logprobs=1)
    assert [choice.text for choice in answer.choices] == [SPOKEN, SPOKEN]
    # With echo OpenAI's first logprob is null, which the SDK's own types do not allow.
    answer = await lenient(client).completions.create(model="sim", prompt=["a", "b"], logprobs=1, echo=True)
    assert [choice.text for choice in answer.choices] == ["a" + SPOKEN, "b" + SPOKEN]
    assert [model.id async for model in client.models.list()] == ["sim", "org/sim-model", "other"]
    assert (await client.models.retrieve("org/sim-model")).id == "org/sim-model"


async def test_openai_sdk_reads_a_completion_stream(client: openai.AsyncOpenAI) -> None:
    # OpenAI's streams say `finish_reason: null` until the end, which the SDK's own types do not allow here.
    stream = await lenient(client).completions.create(model="sim", prompt="a", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == SPOKEN


async def test_openai_sdk_raises_the_right_errors(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="sim", messages=HI, temperature=7)
    assert (bad.value.param, bad.value.type, bad.value.code) == (
        "temperature",
        "invalid_request_error",
        "invalid_value",
    )
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-9", messages=HI)
    assert missing.value.code == "model_not_found"


async def test_openai_sdk_raises_an_error_that_comes_within_a_stream() -> None:
    def script(job: Any) -> Iterable[Step]:
        yield StepDelta(job.request_id, token_ids=(1,), text="Once")
        yield 0.01
        yield ReplicaLostError("the replica died")

    async with listening(serve(script)) as port, sdk(port) as client:
        stream = await client.chat.completions.create(model="sim", messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="the replica died"):
            async for _chunk in stream:
                pass


async def test_openai_sdk_retries_an_overload_after_the_time_we_name() -> None:
    tries: list[str] = []

    def script(job: Any) -> Iterable[Step]:
        tries.append(job.request_id)
        if len(tries) == 1:
            yield QueueFullError("full", retry_after_s=0.01)
        yield from spoken(job)

    async with listening(serve(script)) as port, sdk(port, max_retries=1) as client:
        answer = await client.chat.completions.create(model="sim", messages=HI)
    assert answer.choices[0].message.content == SPOKEN
    assert len(tries) == 2


async def test_openai_sdk_with_a_wrong_key_is_told_so() -> None:
    served = serve(options=Options(tenants=(TenantConfig(id="a", keys=("sk-real",)),)))
    async with listening(served) as port, sdk(port) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


@asynccontextmanager
async def langchain(served: Served) -> AsyncIterator[dict[str, Any]]:
    """Options for langchain's classes, with an HTTP client that is closed afterwards."""
    async with listening(served) as port, openai.DefaultAsyncHttpxClient() as http:
        yield {
            "model": "sim",
            "base_url": f"http://127.0.0.1:{port}/v1",
            "api_key": "sk-any",
            "max_tokens": 20,
            "max_retries": 0,
            "http_async_client": http,
        }


async def test_langchain_chats_and_streams() -> None:
    async with langchain(serve()) as options:
        chat = ChatOpenAI(**options)
        answer = await chat.ainvoke("hi")
        pieces = [piece async for piece in chat.astream("hi")]
    assert answer.content == SPOKEN
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] == 13
    assert "".join(str(piece.content) for piece in pieces) == SPOKEN


async def test_langchain_completes_with_its_list_of_prompts_and_its_nulls() -> None:
    served = serve()
    async with langchain(served) as options:
        assert await OpenAI(**options).ainvoke("hi") == SPOKEN
    assert served.dispatcher.jobs[0].sampling.max_tokens == 20


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():  # noqa: ASYNC110 — what is waited for happens in the server, which sets no event
            await asyncio.sleep(0.002)


async def send_chat(port: int, **fields: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    body = json.dumps({"model": "sim", "messages": HI, **fields}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(body), body)
    )
    await writer.drain()
    return reader, writer


def endless(job: Any) -> Iterable[Step]:
    while True:
        yield StepDelta(job.request_id, token_ids=(65,), text="A")
        yield 0.005


def silent(job: Any) -> Iterable[Step]:
    yield asyncio.Event()


@pytest.mark.parametrize(
    ("script", "fields"),
    [
        (endless, {"stream": True}),
        (endless, {"stream": True, "n": 3}),
        (endless, {}),
        (silent, {"stream": True}),
        (silent, {}),
        (silent, {"n": 2}),
    ],
)
async def test_a_client_that_goes_away_cancels_all_its_jobs_at_once(script: Any, fields: dict[str, Any]) -> None:
    served: Served = serve(script)
    num_jobs = fields.get("n", 1)
    async with listening(served) as port:
        reader, writer = await send_chat(port, **fields)
        await until(lambda: len(served.dispatcher.jobs) == num_jobs)
        if script is endless and fields.get("stream"):
            await reader.readuntil(b'"A"')
        writer.close()
        await until(lambda: len(served.dispatcher.cancelled) == num_jobs)
        await until(lambda: bool(served.ledger.records))
    (record,) = served.ledger.records
    assert (record.outcome, record.status, record.num_choices) == ("cancelled", 499, num_jobs)
    assert served.gateway.tenants.quota(served.dispatcher.jobs[0].tenant).num_open == 0
    assert 'warmgate_requests_in_flight{model="sim"} 0.0' in served.gateway.metrics.exposition().decode()


async def test_a_client_that_goes_away_while_sending_leaves_a_record_and_no_job() -> None:
    served = serve()
    async with listening(served) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.close()
        await until(lambda: bool(served.ledger.records))
    assert served.ledger.records[0].outcome == "cancelled"
    assert served.dispatcher.jobs == []


async def test_connections_are_kept_for_the_next_request() -> None:
    async with listening(serve()) as port:
        reader, writer = await send_chat(port, stream=True)
        await reader.readuntil(b"0\r\n\r\n")
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
