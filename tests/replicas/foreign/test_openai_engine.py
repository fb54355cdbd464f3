"""Servers that run already, as replicas: a mock of vLLM's HTTP API that misbehaves on demand."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from configs.schema import EngineConfig, UpstreamConfig
from configs.tokenizer import load_model_files
from ops.bench.asgi import serve_asgi
from ops.bench.mock_vllm import Behaviour, MockVllm
from replicas.contract import (
    EngineDeadError,
    EngineError,
    GenerateRequest,
    RefusedError,
    SamplingParams,
    StepDelta,
    pack_tokens,
)
from replicas.foreign.flavours import LLAMA_CPP, OPENAI, SGLANG, VLLM, kv_tokens, read_gauges
from replicas.foreign.server import Upstream
from replicas.foreign.wire import beyond, body_of, status_fault
from replicas.openai_engine import OpenAiEngine, _events

FILES = load_model_files("sim:bytes", Path("/nonexistent"))


@dataclass
class World:
    """An engine in front of a mock. `deltas`: by request."""

    mock: MockVllm
    engine: OpenAiEngine
    deltas: dict[str, list[StepDelta]] = field(default_factory=lambda: defaultdict(list))
    ended: dict[str, asyncio.Event] = field(default_factory=lambda: defaultdict(asyncio.Event))
    num_calls: int = 0

    def take(self, deltas: Sequence[StepDelta]) -> None:
        self.num_calls += 1
        for delta in deltas:
            self.deltas[delta.request_id].append(delta)
            if delta.finish_reason is not None:
                self.ended[delta.request_id].set()

    async def ask(self, name: str, **more: Any) -> list[StepDelta]:
        self.engine.submit(request(name, **more))
        return await self.end_of(name)

    async def end_of(self, name: str) -> list[StepDelta]:
        await asyncio.wait_for(self.ended[name].wait(), 20)
        return self.deltas[name]


def request(name: str = "r", tokens: Sequence[int] = range(40), **sampling: Any) -> GenerateRequest:
    params = SamplingParams(**{"max_tokens": 5, "seed": 1} | sampling)
    return GenerateRequest(request_id=name, prompt=pack_tokens(tokens), sampling=params)


@contextlib.asynccontextmanager
async def world(behaviour: Behaviour | None = None, self_check: bool = False, **upstream: Any) -> AsyncIterator[World]:
    mock = MockVllm(behaviour or Behaviour())
    async with serve_asgi(mock) as served:
        place = UpstreamConfig(**{"url": served.url, "health_period_s": 0.05} | upstream)
        config = EngineConfig(kind="openai", upstream=place, block_size=8, self_check=self_check)
        engine = OpenAiEngine(Upstream(config, FILES, "m"))
        found = World(mock, engine)
        try:
            await engine.start(found.take)
            yield found
        finally:
            await engine.close()


async def test_facts_come_from_the_server() -> None:
    async with world(Behaviour(max_model_len=4096), kv_tokens=800) as w:
        facts = w.engine._facts
        assert facts is not None
        assert (facts.engine, facts.max_model_len, facts.num_blocks, facts.device) == ("vllm", 4096, 100, "upstream")
        assert facts.structured and facts.events and not facts.exact_resume


async def test_an_answer_is_the_servers_text_with_token_ids() -> None:
    async with world() as w:
        deltas = await w.ask("r")
        assert "".join(delta.text for delta in deltas) == " t0 t1 t2 t3 t4"
        assert deltas[-1].finish_reason == "length"
        assert sum(delta.finish_reason is not None for delta in deltas) == 1
        assert bytes(token for delta in deltas for token in delta.token_ids) == b" t0 t1 t2 t3 t4"
        assert deltas[0].num_cached_tokens == 0 and all(d.num_cached_tokens is None for d in deltas[1:])
        stats = w.engine.stats()
        assert (stats.num_prompt_tokens, stats.num_running, stats.num_waiting) == (40, 0, 0)


async def test_what_was_sent_is_believed_to_be_cached() -> None:
    async with world() as w:
        await w.ask("r")
        (stored,) = w.engine.kv_events()
        assert len(stored.block_ids) == 5 and w.engine.stats().kv_seq == 1
        await w.ask("again")
        assert w.engine.kv_events() == []


@pytest.mark.parametrize(
    ("behaviour", "code", "retryable"),
    [
        (Behaviour(status=500), "internal", True),
        (Behaviour(status=503), "draining", True),
        (Behaviour(status=429), "overloaded", True),
        (Behaviour(status=400), "unsupported_parameter", False),
        (Behaviour(crash_on_request=1), "upstream_lost", True),
        (Behaviour(crash_after_chunks=2), "upstream_lost", True),
    ],
)
async def test_a_failure_is_one_fault_that_says_whether_another_may_try(
    behaviour: Behaviour, code: str, retryable: bool
) -> None:
    async with world(behaviour) as w:
        deltas = await w.ask("r")
        fault = deltas[-1].fault
        assert fault is not None and (fault.code, fault.retryable) == (code, retryable), fault
        assert sum(delta.finish_reason is not None for delta in deltas) == 1


async def test_an_abort_closes_the_connection() -> None:
    async with world(Behaviour(stop_after=1000, chunk_interval_s=0.01)) as w:
        w.engine.submit(request(max_tokens=1000))
        while len(w.deltas["r"]) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert w.engine.stats().num_running == 1
        w.engine.abort("r")
        assert (await w.end_of("r"))[-1].finish_reason == "abort"
        for _ in range(200):
            if w.mock.counts.aborted:
                break
            await asyncio.sleep(0.01)
        assert w.mock.counts.aborted == 1
        w.engine.abort("r")


async def test_what_is_aborted_or_closed_at_once_has_its_end_too() -> None:
    async with world() as w:
        w.engine.submit(request())
        w.engine.abort("r")
        assert [delta.finish_reason for delta in await w.end_of("r")] == ["abort"]
        await asyncio.wait_for(w.engine.drain(), 5)
        w.engine._draining = False
        w.engine.submit(request("b"))
        await w.engine.close()
        assert [delta.finish_reason for delta in w.deltas["b"]] == ["error"]


async def test_an_abort_after_the_end_adds_nothing() -> None:
    async with world() as w:
        take = w.engine._sink
        assert take is not None

        def taking(deltas: Sequence[StepDelta]) -> None:
            take(deltas)
            w.engine.abort("r")

        w.engine._sink = taking
        w.engine.submit(request())
        await w.end_of("r")
        await asyncio.sleep(0.1)
        assert sum(delta.finish_reason is not None for delta in w.deltas["r"]) == 1


async def test_lines_end_at_newlines_alone() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for part in ('data: {"a": "x\u2028y', '\u0085"}\r\n', "\n: comment\nda", "ta:[DONE]\n"):
            yield part.encode()

    found = [data.decode() for data in [data async for data in _events(chunks())]]
    assert found == ['{"a": "x\u2028y\u0085"}', "[DONE]"]


async def test_load_of_others_counts_too() -> None:
    async with world(Behaviour(stop_after=200, chunk_interval_s=0.01)) as w:
        w.mock.counts.running += 7
        for _ in range(200):
            if w.engine.stats().num_running == 7:
                break
            await asyncio.sleep(0.01)
        assert w.engine.stats().num_running == 7


async def test_a_server_that_stops_answering_is_dead_and_its_requests_end_once() -> None:
    async with world(Behaviour(stop_after=2000, chunk_interval_s=0.02)) as w:
        w.engine.submit(request(max_tokens=2000))
        w.mock.behaviour = Behaviour(stop_after=2000, chunk_interval_s=0.02, healthy=False)
        last = (await w.end_of("r"))[-1]
        assert last.fault is not None and last.fault.code == "engine_dead"
        with pytest.raises(EngineDeadError):
            w.engine.stats()
        with pytest.raises(RefusedError):
            w.engine.submit(request("late"))


async def test_start_waits_for_a_server_that_is_not_there_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicas.foreign.server.RETRY_S", 0.05)
    mock = MockVllm(Behaviour(healthy=False))
    async with serve_asgi(mock) as served:
        config = EngineConfig(kind="openai", upstream=UpstreamConfig(url=served.url))
        engine = OpenAiEngine(Upstream(config, FILES, "m"))
        starting = asyncio.ensure_future(engine.start(lambda deltas: None))
        await asyncio.sleep(0.2)
        assert not starting.done()
        mock.behaviour = Behaviour()
        assert (await asyncio.wait_for(starting, 10)).engine == "vllm"
        await engine.close()


async def test_a_model_that_the_server_lacks_is_named() -> None:
    with pytest.raises(EngineError, match="has no model 'other'; it has: mock"):
        async with world(model="other"):
            pass


async def test_a_server_that_takes_no_token_ids_is_not_started_with() -> None:
    with pytest.raises(EngineError, match=r"takes no prompts as token ids.*422"):
        async with world(Behaviour(status=422), self_check=True):
            pass
    async with world(Behaviour(fail_first=1, fail_status=503), self_check=True) as w:
        assert len(await w.ask("r")) > 1, "a failure that may pass is no reason"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("vllm", "vllm"),
        ("sglang", "sglang"),
        ("llamacpp", "llama.cpp"),
        ("tensorrt_llm", "tensorrt-llm"),
        ("me", "openai"),
    ],
)
async def test_a_server_is_known_by_what_it_says_of_its_models(owner: str, name: str) -> None:
    """Routes are no sign: several servers have `/version`."""
    async with world(Behaviour(owner=owner)) as w:
        assert w.engine._facts is not None and w.engine._facts.engine == name


async def test_drain_waits_for_the_running() -> None:
    async with world(Behaviour(chunk_interval_s=0.02)) as w:
        w.engine.submit(request())
        draining = asyncio.ensure_future(w.engine.drain())
        await asyncio.sleep(0)
        with pytest.raises(RefusedError) as refused:
            w.engine.submit(request("late"))
        assert refused.value.fault.code == "draining"
        await asyncio.wait_for(draining, 20)
        assert w.deltas["r"][-1].finish_reason == "length"


def test_what_a_server_would_pass_over_in_silence_is_refused() -> None:
    sampling = SamplingParams(max_tokens=1, seed=0, top_k=5, min_tokens=2, include_stop_str_in_output=True, logprobs=1)
    names = {f.name: [fault.param for fault in beyond(sampling, f)] for f in (VLLM, SGLANG, LLAMA_CPP, OPENAI)}
    assert names == {
        "vllm": [],
        "sglang": ["include_stop_str_in_output", "logprobs"],
        "llama.cpp": ["min_tokens", "include_stop_str_in_output", "logprobs"],
        "openai": ["top_k", "min_tokens", "include_stop_str_in_output", "logprobs"],
    }


def test_fields_go_by_the_servers_names() -> None:
    import json

    wanted = request(repetition_penalty=1.5, stop=("x",), logit_bias={3: 1.0}, logprobs=2)
    there = json.loads(body_of(wanted, "name", LLAMA_CPP))
    assert (there["repeat_penalty"], there["stop"], there["logit_bias"]) == (1.5, ["x"], {"3": 1.0})
    assert there["prompt"] == list(range(40)) and "return_token_ids" not in there
    assert json.loads(body_of(wanted, "name", VLLM))["return_tokens_as_token_ids"] is True


def test_metrics_are_summed_and_sizes_read() -> None:
    text = (
        '# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine="0"} 2\n'
        'vllm:num_requests_running{engine="1"} 3\n# TYPE vllm:cache_config_info gauge\n'
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0\n'
    )
    assert VLLM.gauges is not None and read_gauges(text, VLLM.gauges).num_running == 5
    assert kv_tokens(text) == 1600


@pytest.mark.parametrize("text", ['{"error": {"message": "no"}}', '{"message": "no"}', "no"])
def test_a_servers_own_words_are_passed_on(text: str) -> None:
    assert status_fault(400, text).message == "no"


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [(400, "unsupported_parameter", False), (429, "overloaded", True), (503, "draining", True), (401, "internal", True),
     (404, "internal", True), (500, "internal", True)],
)  # fmt: skip
def test_what_a_server_answers_is_nobody_elses_fault(status: int, code: str, retryable: bool) -> None:
    """503 is no full queue of ours, and 404 no parameter of the client's: the model has gone there."""
    fault = status_fault(status, "its words")
    assert (fault.code, fault.retryable) == (code, retryable) and "its words" in fault.message
