"""The HTTP face over a real engine in the same process: scheduler, sampler's seeds, detokeniser and stop strings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from configs.schema import EngineConfig, SimConfig
from configs.tokenizer import ModelFiles
from gateway.app import build_app
from gateway.types import Job
from replicas.contract import EngineFacts, GenerateRequest
from replicas.detokenize import TextEngine
from replicas.local import LocalEngine
from replicas.sim_engine import sim_engine
from tests.gateway.deltas import PumpedDeltas
from tests.gateway.scripted import Options, serve
from tests.gateway.sse_reader import events

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 24}
PROMPT = {"model": "sim", "prompt": "Once", "max_tokens": 24}


class EngineDispatcher:
    """`gateway.types.Dispatcher` over one engine in this process."""

    def __init__(self, local: LocalEngine) -> None:
        self._local = local

    def generate(self, job: Job) -> PumpedDeltas:
        request = GenerateRequest(
            request_id=job.request_id, prompt=job.prompt, sampling=job.sampling, salt=job.salt, priority=job.priority
        )
        return PumpedDeltas(self._local.stream(request))

    def facts(self, model_id: str) -> EngineFacts | None:
        return self._local.facts

    def num_ready(self, model_id: str) -> int:
        return 1


@pytest.fixture
async def client(sim_files: ModelFiles) -> AsyncIterator[httpx.AsyncClient]:
    fast = EngineConfig(kind="sim", sim=SimConfig(step_base_s=0, step_per_sequence_s=0, prefill_tokens_per_s=1e9))
    engine = sim_engine(fast, sim_files.vocab_size, sim_files.special.eos, "sim")
    async with LocalEngine(TextEngine(engine, sim_files.tokenizer)) as local:
        gateway = replace(serve(options=Options()).gateway, dispatcher=EngineDispatcher(local))
        transport = httpx.ASGITransport(build_app(gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as connected:
            yield connected


async def whole(client: httpx.AsyncClient, path: str, **body: Any) -> Any:
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def streamed(client: httpx.AsyncClient, path: str, **body: Any) -> list[Any]:
    *chunks, done = events((await client.post(path, json={**body, "stream": True})).text)
    assert done == "[DONE]"
    return chunks


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"] and chunk["choices"][0]["index"] == index]
    return "".join(c.get("text", c.get("delta", {}).get("content", "")) for c in choices)


async def test_a_stream_says_what_the_whole_answer_says(client: httpx.AsyncClient) -> None:
    for fields in ({"temperature": 0}, {"seed": 5}, {"seed": 5, "n": 3}):
        answer = await whole(client, CHAT, **HI, **fields)
        chunks = await streamed(client, CHAT, **HI, **fields)
        for choice in answer["choices"]:
            assert text_of(chunks, choice["index"]) == choice["message"]["content"] != ""
            assert choice["finish_reason"] in ("stop", "length")


async def test_choices_with_one_seed_differ_and_repeat(client: httpx.AsyncClient) -> None:
    first, second = [await whole(client, CHAT, **HI, seed=3, n=4) for _ in range(2)]
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert len(set(texts)) > 1
    assert texts == [choice["message"]["content"] for choice in second["choices"]]


async def test_a_stop_string_cuts_the_text_and_is_named(client: httpx.AsyncClient) -> None:
    text = (await whole(client, TEXT, **PROMPT, temperature=0))["choices"][0]["text"]
    stop = text[7:10]
    (choice,) = (await whole(client, TEXT, **PROMPT, temperature=0, stop=[stop]))["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


async def test_usage_counts_prompt_output_and_what_was_cached(client: httpx.AsyncClient) -> None:
    long = {**PROMPT, "prompt": "All work and no play. " * 20}
    cold = (await whole(client, TEXT, **long))["usage"]
    warm = (await whole(client, TEXT, **long))["usage"]
    assert cold["prompt_tokens"] == warm["prompt_tokens"] == 440
    assert cold["prompt_tokens_details"]["cached_tokens"] == 0
    assert warm["prompt_tokens_details"]["cached_tokens"] >= 400
    assert 1 <= warm["completion_tokens"] <= 24


async def test_logprobs_fit_the_text(client: httpx.AsyncClient) -> None:
    (choice,) = (await whole(client, TEXT, **PROMPT, logprobs=2, ignore_eos=True))["choices"]
    logprobs = choice["logprobs"]
    assert len({len(values) for values in logprobs.values()}) == 1
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"].startswith(token, offset) or token.startswith("<|")
