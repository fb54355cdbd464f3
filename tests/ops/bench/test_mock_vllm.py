"""The mock upstream as its users meet it: vLLM's routes over a socket, the openai client, every misbehaviour."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from ops.bench.asgi import serve_asgi
from ops.bench.mock_vllm import VERSION, Behaviour, MockVllm, StepClock, main

ROOT = Path(__file__).parents[3]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO: dict[str, Any] = {"model": "mock", "messages": [{"role": "user", "content": "hello"}]}


@contextlib.asynccontextmanager
async def mock(**behaviour: Any) -> AsyncIterator[tuple[MockVllm, httpx.AsyncClient]]:
    """A mock in this process and a client of it."""
    app = MockVllm(Behaviour(**behaviour))
    async with serve_asgi(app) as served, httpx.AsyncClient(base_url=served.url, timeout=20) as client:
        yield app, client


@contextlib.asynccontextmanager
async def mock_process(**behaviour: Any) -> AsyncIterator[tuple[asyncio.subprocess.Process, httpx.AsyncClient]]:
    """A mock in a process of its own, which may crash."""
    command = (sys.executable, "-m", "ops.bench.mock_vllm", "--behaviour", json.dumps(behaviour))
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        said = json.loads(await asyncio.wait_for(process.stdout.readline(), 20))
        assert said["pid"] == process.pid
        async with httpx.AsyncClient(base_url=said["url"], timeout=20) as client:
            yield process, client
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def openai_client(client: httpx.AsyncClient, max_retries: int = 0) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{client.base_url}/v1".replace("//v1", "/v1")
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=max_retries) as made:
        yield made


async def seen(client: httpx.AsyncClient) -> dict[str, Any]:
    counts: dict[str, Any] = (await client.get("/mock/counts")).json()
    return counts


async def until_seen(client: httpx.AsyncClient, **expected: int) -> None:
    """Returns when the counts are as expected; they must be so within 5 s."""
    counts: dict[str, Any] = {}
    for _ in range(250):
        counts = await seen(client)
        if all(counts[name] == value for name, value in expected.items()):
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{expected=} {counts=}")


def events_of(body: str) -> list[dict[str, Any]]:
    """The events of an SSE body that ends in `[DONE]`."""
    *events, done, rest = body.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(num_tokens: int) -> str:
    return "".join(f" t{i}" for i in range(num_tokens))


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", CHAT, HELLO),
        ("POST", COMPLETIONS, {"prompt": "hello"}),
        ("POST", f"{CHAT}/render", HELLO),
        ("POST", f"{COMPLETIONS}/render", {"prompt": "hello"}),
        ("POST", "/tokenize", {"prompt": "hello"}),
        ("POST", "/detokenize", {"tokens": [104, 105]}),
        ("GET", "/v1/models", None),
        ("GET", "/health", None),
        ("GET", "/version", None),
        ("GET", "/metrics", None),
        ("GET", "/mock/counts", None),
        ("POST", "/mock/behaviour", {}),
    ],
)
async def test_every_route_answers_200_and_names_its_worker(method: str, path: str, body: Any) -> None:
    async with mock(worker_id="mock-7") as (app, client):
        answer = await client.request(method, path, json=body)
        assert (answer.status_code, answer.headers["x-worker-id"]) == (200, "mock-7")
        assert app.counts.by_path == {path: 1}
        other = "GET" if method == "POST" else "POST"
        wrong = await client.request(other, path)
        assert (wrong.status_code, wrong.headers["x-worker-id"]) == (404, "mock-7")


async def test_routes_that_only_inform_say_what_vllm_says() -> None:
    async with mock(model="m1", max_model_len=99) as (_, client):
        [card] = (await client.get("/v1/models")).json()["data"]
        assert (card["id"], card["object"], card["owned_by"], card["max_model_len"]) == ("m1", "model", "vllm", 99)
        assert (await client.get("/version")).json() == {"version": VERSION}
        health = await client.get("/health")
        assert (health.status_code, health.content) == (200, b"")
        await client.post("/mock/behaviour", json={"healthy": False})
        assert (await client.get("/health")).status_code == 503


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/version", "/metrics"])
async def test_head_has_the_headers_of_get_and_no_body(path: str) -> None:
    async with mock(worker_id="mock-3") as (_, client):
        head, get = await client.head(path), await client.get(path)
        assert (head.status_code, head.content, head.headers["x-worker-id"]) == (200, b"", "mock-3")
        assert head.headers["content-type"] == get.headers["content-type"]
        assert head.headers.get("content-length") == get.headers.get("content-length")


async def test_tokens_are_bytes_and_come_back_as_the_same_text() -> None:
    async with mock(max_model_len=50) as (_, client):
        answer = (await client.post("/tokenize", json={"prompt": "grün"})).json()
        assert (answer["tokens"], answer["count"]) == (list("grün".encode()), 5)
        assert answer["max_model_len"] == 50
        back = await client.post("/detokenize", json={"tokens": answer["tokens"]})
        assert back.json() == {"prompt": "grün"}
        assert (await client.post("/detokenize", json={"tokens": [256]})).status_code == 400
        chat = (await client.post("/tokenize", json=HELLO)).json()
        assert bytes(chat["tokens"]) == b"<|user|>hello"


async def test_render_of_chat_is_one_request_with_the_tokens_that_generating_would_count() -> None:
    async with mock(stop_after=5) as (app, client):
        rendered = (await client.post(f"{CHAT}/render", json=HELLO | {"stream": True})).json()
        answered = (await client.post(CHAT, json=HELLO)).json()
        assert bytes(rendered["token_ids"]) == b"<|user|>hello"
        assert len(rendered["token_ids"]) == answered["usage"]["prompt_tokens"]
        assert rendered["request_id"].startswith("chatcmpl-")
        assert (rendered["model"], rendered["stream"]) == ("mock", True)
        assert rendered["sampling_params"]["max_tokens"] == 5
        assert (app.counts.renders, app.counts.requests) == (1, 1)


async def test_render_of_completions_is_one_request_a_prompt() -> None:
    async with mock(render_s=0.1) as (app, client):
        body = {"model": "mock", "prompt": ["ab", [1, 2, 3]], "max_tokens": 7, "n": 2}
        began = time.perf_counter()
        first, second = (await client.post(f"{COMPLETIONS}/render", json=body)).json()
        assert 0.09 <= time.perf_counter() - began < 5
        assert (first["token_ids"], second["token_ids"]) == ([97, 98], [1, 2, 3])
        assert first["request_id"].endswith("-0") and second["request_id"].endswith("-1")
        assert all((r["sampling_params"]["max_tokens"], r["sampling_params"]["n"]) == (7, 2) for r in (first, second))
        assert app.counts.renders == 1


@pytest.mark.parametrize(("max_tokens", "num_tokens", "reason"), [(3, 3, "length"), (None, 6, "stop"), (9, 6, "stop")])
async def test_openai_client_reads_a_whole_chat_answer(max_tokens: int | None, num_tokens: int, reason: str) -> None:
    async with mock(stop_after=6) as (app, client), openai_client(client) as api:
        limit: dict[str, Any] = {} if max_tokens is None else {"max_tokens": max_tokens}
        answer = await api.chat.completions.create(**HELLO, **limit)
        [choice] = answer.choices
        assert (choice.message.role, choice.message.content) == ("assistant", text_of(num_tokens))
        assert (choice.finish_reason, answer.object, answer.model) == (reason, "chat.completion", "mock")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len("<|user|>hello")
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + num_tokens
        assert (app.counts.tokens, app.counts.running) == (num_tokens, 0)


async def test_openai_client_reads_a_chat_stream() -> None:
    async with mock(stop_after=4) as (app, client), openai_client(client) as api:
        stream = await api.chat.completions.create(**HELLO, n=2, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        *chosen, usage = chunks
        assert [chunk.choices[0].delta.role for chunk in chosen] == ["assistant"] * 2 + [None] * 8
        for index in (0, 1):
            own = [chunk.choices[0] for chunk in chosen if chunk.choices[0].index == index]
            assert "".join(choice.delta.content or "" for choice in own) == text_of(4)
            assert [choice.finish_reason for choice in own] == [None] * 4 + ["stop"]
        assert usage.choices == [] and usage.usage is not None and usage.usage.completion_tokens == 8
        assert len({chunk.id for chunk in chunks}) == 1
        assert app.counts.tokens == 8


async def test_openai_client_reads_completions_of_several_prompts_whole_and_streamed() -> None:
    async with mock(stop_after=3) as (_, client), openai_client(client) as api:
        whole = await api.completions.create(model="mock", prompt=["ab", "c"], n=2)
        assert [(choice.index, choice.text) for choice in whole.choices] == [(i, text_of(3)) for i in range(4)]
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 12)
        stream = await api.completions.create(model="mock", prompt=[[1, 2], [3]], max_tokens=3, stream=True)
        texts = {0: "", 1: ""}
        reasons = []
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                reasons += [choice.finish_reason] if choice.finish_reason else []
        assert texts == {0: text_of(3), 1: text_of(3)}
        assert reasons == ["length", "length"]


async def test_usage_of_a_stream_comes_only_when_asked_for() -> None:
    async with mock(stop_after=3) as (_, client):
        plain = events_of((await client.post(CHAT, json=HELLO | {"stream": True})).text)
        assert not any("usage" in event for event in plain)
        asked = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        events = events_of((await client.post(CHAT, json=HELLO | asked)).text)
        assert [event["usage"]["completion_tokens"] for event in events] == [0, 1, 2, 3, 3]
        assert events[-1]["choices"] == [] and all(event["choices"] for event in events[:-1])


async def test_answer_id_is_the_callers_request_id() -> None:
    async with mock() as (_, client):
        answer = await client.post(COMPLETIONS, json={"prompt": "x"}, headers={"x-request-id": "abc"})
        assert answer.json()["id"] == "cmpl-abc"


async def test_first_token_waits_for_ttft_and_the_headers_do_not() -> None:
    async with mock(ttft_s=2.0, stop_after=2) as (_, client):
        began = time.perf_counter()
        async with client.stream("POST", CHAT, json=HELLO | {"stream": True}) as answer:
            headers_s = time.perf_counter() - began
            body = await anext(aiter(answer.aiter_text()))
            first_s = time.perf_counter() - began
        assert "assistant" in body
        assert headers_s < 1.9 <= first_s < 12


@pytest.mark.parametrize("stream", [True, False])
async def test_tokens_are_an_interval_apart(stream: bool) -> None:
    async with mock(chunk_interval_s=0.04, stop_after=6) as (_, client):
        began = time.perf_counter()
        answer = await client.post(CHAT, json=HELLO | {"stream": stream})
        assert 0.19 <= time.perf_counter() - began < 10
        assert answer.text.count(" t5") == 1


async def test_tokens_of_one_write_come_without_a_pause_between() -> None:
    async with mock(chunk_interval_s=0.8, chunks_per_write=4, stop_after=8) as (_, client):
        began = time.perf_counter()
        events = events_of((await client.post(CHAT, json=HELLO | {"stream": True})).text)
        assert 0.78 <= time.perf_counter() - began < 5  # one pause, where each token alone would take seven
        assert "".join(event["choices"][0]["delta"]["content"] for event in events) == text_of(8)


async def test_streams_that_began_apart_wake_in_the_same_tick() -> None:
    clock, waits = StepClock(60.0), []
    for _ in range(2):
        waits.append(asyncio.create_task(clock.wait()))
        await asyncio.sleep(0.01)
    due = clock._last_s
    clock._fire()
    await asyncio.wait_for(asyncio.gather(*waits), 10)
    after = asyncio.create_task(clock.wait())
    await asyncio.sleep(0)
    assert clock._last_s == due + 60.0, "counted from the tick, not from the waking"
    after.cancel()


async def test_a_tick_comes_by_itself_after_its_interval() -> None:
    clock, began = StepClock(0.05), time.perf_counter()
    for _ in range(2):
        await asyncio.wait_for(clock.wait(), 10)
    assert time.perf_counter() - began >= 0.09


async def test_first_requests_fail_and_the_next_succeeds() -> None:
    async with mock(fail_first=2, fail_status=500) as (app, client):
        answers = [await client.post(CHAT, json=HELLO) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [500, 500, 200, 200]
        assert answers[0].json()["error"] == {
            "message": "told to answer 500",
            "type": "MockError",
            "param": None,
            "code": 500,
        }
        assert (app.counts.requests, app.counts.refused) == (4, 2)


async def test_openai_client_that_retries_gets_past_the_failing_first_request() -> None:
    async with mock(fail_first=1, stop_after=2) as (app, client), openai_client(client, max_retries=1) as api:
        answer = await api.chat.completions.create(**HELLO)
        assert answer.choices[0].message.content == text_of(2)
        assert (app.counts.requests, app.counts.refused) == (2, 1)


async def test_status_holds_for_all_and_says_when_to_retry() -> None:
    async with mock(status=429, retry_after_s=7, worker_id="busy") as (app, client), openai_client(client) as api:
        for _ in range(2):
            with pytest.raises(openai.RateLimitError) as caught:
                await api.chat.completions.create(**HELLO)
            assert caught.value.response.headers["retry-after"] == "7"
            assert caught.value.response.headers["x-worker-id"] == "busy"
        assert app.counts.refused == 2
        await client.post("/mock/behaviour", json={"retry_after_s": None})
        assert "retry-after" not in (await client.post(CHAT, json=HELLO)).headers


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        (CHAT, HELLO | {"model": "other"}, 404, "NotFoundError"),
        (CHAT, HELLO | {"max_tokens": 30}, 400, "BadRequestError"),
        (COMPLETIONS, {"prompt": ["x", "y" * 41]}, 400, "BadRequestError"),
        (COMPLETIONS, {"prompt": 5}, 400, "BadRequestError"),
        (f"{CHAT}/render", {"messages": "hi"}, 400, "BadRequestError"),
    ],
)
async def test_what_cannot_be_answered_is_refused_in_vllms_words(path: str, body: Any, status: int, kind: str) -> None:
    async with mock(max_model_len=40) as (app, client):
        answer = await client.post(path, json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (status, kind, status)
        assert app.counts.running == 0


async def test_behaviour_changes_only_by_known_keys_and_values() -> None:
    async with mock(stop_after=2) as (app, client):
        assert (await client.post("/mock/behaviour", json={"stop_after": 3})).json()["stop_after"] == 3
        for wrong in ({"stop_afer": 4}, {"stop_after": 0}, {"ttft_s": -1}, {"status": 99}):
            assert (await client.post("/mock/behaviour", json=wrong)).status_code == 400
        assert app.behaviour == Behaviour(stop_after=3)
        assert (await client.post(COMPLETIONS, json={"prompt": "x"})).json()["choices"][0]["text"] == text_of(3)


async def test_metrics_parse_and_follow_what_runs() -> None:
    async with mock(model="m1", chunk_interval_s=0.02, stop_after=1000) as (_, client):

        async def metrics() -> dict[str, tuple[float, str]]:
            families = text_string_to_metric_families((await client.get("/metrics")).text)
            return {s.name: (s.value, s.labels["model_name"]) for family in families for s in family.samples}

        idle = await metrics()
        assert idle["vllm:num_requests_running"] == (0.0, "m1")
        assert idle["vllm:num_requests_waiting"] == (0.0, "m1")
        body = {"prompt": "x", "stream": True}
        async with client.stream("POST", COMPLETIONS, json=body) as answer:
            await anext(aiter(answer.aiter_raw()))
            busy = await metrics()
        assert busy["vllm:num_requests_running"] == (1.0, "m1")
        assert busy["vllm:generation_tokens_total"][0] >= 1
        await until_seen(client, running=0)
        assert (await metrics())["vllm:num_requests_running"] == (0.0, "m1")


async def test_stream_whose_client_left_is_counted_as_abandoned() -> None:
    async with mock(chunk_interval_s=0.01, stop_after=10_000) as (app, client):
        async with client.stream("POST", CHAT, json=HELLO | {"stream": True}) as answer:
            await anext(aiter(answer.aiter_raw()))
        await until_seen(client, aborted=1, running=0)
        assert 0 < app.counts.tokens < 10_000


async def test_whole_answer_whose_client_left_is_counted_as_abandoned() -> None:
    async with mock(ttft_s=60) as (_, client):
        with pytest.raises(httpx.ReadTimeout):
            await client.post(CHAT, json=HELLO, timeout=0.2)
        await until_seen(client, aborted=1, running=0, tokens=0)


async def test_finished_answers_are_not_abandoned() -> None:
    async with mock(stop_after=3) as (_, client):
        for stream in (True, False):
            assert (await client.post(CHAT, json=HELLO | {"stream": stream})).status_code == 200
        await until_seen(client, running=0, aborted=0, tokens=6, requests=2)


async def test_crashing_process_cuts_the_connection_before_any_answer_and_exits() -> None:
    async with mock_process(crash_on_request=2) as (process, client):
        assert (await client.post(CHAT, json=HELLO)).status_code == 200
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            await client.post(CHAT, json=HELLO)
        assert await asyncio.wait_for(process.wait(), 10) == 70
        with pytest.raises(httpx.ConnectError):
            await client.get("/health")


async def test_process_that_crashes_after_chunks_leaves_a_stream_without_an_end() -> None:
    async with mock_process(crash_after_chunks=3, chunk_interval_s=0.01, worker_id="doomed") as (process, client):
        body = b""
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            async with client.stream("POST", COMPLETIONS, json={"prompt": "x", "stream": True}) as answer:
                assert (answer.status_code, answer.headers["x-worker-id"]) == (200, "doomed")
                async for piece in answer.aiter_raw():
                    body += piece
        events = [json.loads(event.removeprefix("data: ")) for event in body.decode().split("\n\n")[:-1]]
        assert [event["choices"][0]["text"] for event in events] == [" t0", " t1", " t2"]
        assert await asyncio.wait_for(process.wait(), 10) == 70


async def test_process_that_crashes_after_the_last_chunk_never_says_done() -> None:
    async with mock_process(crash_after_chunks=3, stop_after=3) as (process, client):
        body = b""
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            async with client.stream("POST", COMPLETIONS, json={"prompt": "x", "stream": True}) as answer:
                async for piece in answer.aiter_raw():
                    body += piece
        assert b" t2" in body and b"[DONE]" not in body
        assert await asyncio.wait_for(process.wait(), 10) == 70


async def test_crash_in_process_cuts_one_connection_and_serves_the_next() -> None:
    async with mock(crash_on_request=1, stop_after=2) as (app, client):
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            await client.post(CHAT, json=HELLO)
        assert (await client.post(CHAT, json=HELLO)).status_code == 200
        await client.post("/mock/behaviour", json={"crash_after_chunks": 1})
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            await client.post(CHAT, json=HELLO | {"stream": True})
        await until_seen(client, running=0)
        assert app.counts.requests == 3


async def test_process_serves_where_its_first_line_says_until_it_is_ended() -> None:
    async with mock_process(model="m9", stop_after=2) as (process, client):
        answer = await client.post(COMPLETIONS, json={"model": "m9", "prompt": "x"})
        assert answer.json()["choices"][0]["text"] == text_of(2)
        assert (await seen(client))["requests"] == 1
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 10) != 0


@pytest.mark.parametrize("behaviour", ['{"ttft": 1}', '{"ttft_s": "soon"}', "nothing"])
def test_wrong_behaviour_on_the_command_line_is_exit_code_2(behaviour: str) -> None:
    result = CliRunner().invoke(main, ["--behaviour", behaviour])
    assert result.exit_code == 2
    assert "--behaviour" in result.output and "Traceback" not in result.output
