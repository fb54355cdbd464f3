"""The mock of vLLM over a sim engine: a prefix cache that fills and hits, prompts that take their time."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from configs.schema import EngineConfig, SimConfig
from ops.bench.asgi import serve_asgi
from ops.bench.mock_engine import VOCAB_SIZE, EngineVllm
from ops.bench.mock_vllm import Behaviour
from replicas.local import LocalEngine
from replicas.sim_engine import sim_engine

SIM = SimConfig(prefill_tokens_per_s=4000.0, step_base_s=0.001, step_per_sequence_s=0.0, num_blocks=128)
CONFIG = EngineConfig(kind="sim", max_num_batched_tokens=4096, sim=SIM)
WORDS = "a prompt of two hundred and eight characters, which are as many tokens. " * 10


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    behaviour = Behaviour(model="m", max_model_len=8192, stop_after=8192)
    async with (
        LocalEngine(sim_engine(CONFIG, VOCAB_SIZE, (), "m")) as engine,
        serve_asgi(EngineVllm(behaviour, engine)) as served,
        httpx.AsyncClient(base_url=served.url, timeout=20) as made,
    ):
        yield made


async def ask(client: httpx.AsyncClient, prompt: str, max_tokens: int = 2, **more: Any) -> httpx.Response:
    body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "stream": True} | more
    return await client.post("/v1/completions", json=body | {"stream_options": {"include_usage": True}})


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    *found, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in found]


def cached(response: httpx.Response) -> int:
    details = events(response)[-1]["usage"]["prompt_tokens_details"]
    assert isinstance(details["cached_tokens"], int)
    return details["cached_tokens"]


async def test_an_answer_has_the_mocks_words_one_finish_reason_and_usage(client: httpx.AsyncClient) -> None:
    found = events(await ask(client, WORDS[:208], 5))
    assert "".join(e["choices"][0]["text"] for e in found[:-1]) == " t0 t1 t2 t3 t4"
    assert [e["choices"][0]["finish_reason"] for e in found[:-1]] == [None] * 4 + ["length"]
    assert found[-1]["usage"]["prompt_tokens"] == 208
    assert found[-1]["usage"]["completion_tokens"] == 5


async def test_a_prompt_that_came_before_is_cached_as_far_as_full_blocks_go(client: httpx.AsyncClient) -> None:
    assert cached(await ask(client, WORDS[:208])) == 0
    assert cached(await ask(client, WORDS[:208] + " and more")) == 208
    assert cached(await ask(client, WORDS[:100] + " and other words than before")) == 96
    assert cached(await ask(client, "x" + WORDS[:208])) == 0


async def test_what_was_used_least_recently_makes_room_when_the_cache_is_full(client: httpx.AsyncClient) -> None:
    await ask(client, WORDS[:208])
    for letter in "abcdefghij":
        await ask(client, letter * 256)
    assert cached(await ask(client, WORDS[:208])) == 0
    assert cached(await ask(client, "j" * 256)) > 0


async def test_a_cached_prompt_is_answered_sooner_than_a_cold_one(client: httpx.AsyncClient) -> None:
    prompt = WORDS * 2
    began = time.perf_counter()
    await ask(client, prompt, 1)
    cold_s = time.perf_counter() - began
    assert cold_s > len(prompt) / 4000.0
    warm_s = []
    for _ in range(5):
        began = time.perf_counter()
        assert cached(await ask(client, prompt, 1)) > 0.9 * len(prompt)
        warm_s.append(time.perf_counter() - began)
    assert min(warm_s) < cold_s / 2


async def test_prompts_that_come_together_wait_for_one_another(client: httpx.AsyncClient) -> None:
    began = time.perf_counter()
    await asyncio.gather(*(ask(client, letter * 400, 1) for letter in "abcd"))
    assert time.perf_counter() - began > 1600 / 4000.0


async def test_more_than_one_choice_or_a_prompt_that_does_not_fit_is_refused(client: httpx.AsyncClient) -> None:
    assert (await ask(client, "hello", n=2)).status_code == 400
    refused = await ask(client, "x" * 4096)
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "BadRequestError")


def test_the_engine_is_told_as_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(CONFIG), type=EngineConfig) == CONFIG
