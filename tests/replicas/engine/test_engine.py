"""The composed engine: what it finds, what it refuses to start with, the self-check, and its thread."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import torch

import replicas.engine.engine as engine_module
from configs.schema import EngineConfig
from replicas.contract import EngineError, StepDelta
from replicas.engine.engine import native_engine
from replicas.engine.families import read_spec
from replicas.engine.self_check import CheckSubject, reference_logits, self_check
from replicas.engine.sequence import Plan, StepResult
from replicas.engine.weights import Checkpoint
from tests.replicas.engine.conftest import TinyModels
from tests.replicas.engine.driver import build, make_request
from tests.replicas.engine.tiny import FAMILIES, VOCAB, oracle_logits, random_tokens

BLOCK_BYTES = 3 * 16 * 2 * 2 * 16 * 4  # layers, tokens, k and v, heads, head_dim, float32


def test_facts_say_what_was_found(tiny_model: TinyModels) -> None:
    facts = build(tiny_model("llama")[0], max_num_seqs=4).facts
    assert (facts.engine, facts.model, facts.vocab_size, facts.max_model_len) == ("native", "tested", VOCAB, 256)
    assert (facts.dtype, facts.device, facts.eos_token_ids) == ("float32", "cpu", (2,))
    assert facts.exact_resume and facts.prompt_logprobs and facts.events
    assert facts.num_blocks == 4 * 256 // 16  # the budget would allow more; it is never needed
    assert facts.kv_bytes == facts.num_blocks * BLOCK_BYTES


def test_a_small_budget_shortens_the_context(tiny_model: TinyModels) -> None:
    facts = build(tiny_model("llama")[0], kv_cache_gib=5 * BLOCK_BYTES / 2**30).facts
    assert (facts.num_blocks, facts.max_model_len) == (5, 80)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_model_len": 257}, "max_model_len 257 is beyond the model's context of 256"),
        ({"max_model_len": 200, "kv_cache_gib": 5 * BLOCK_BYTES / 2**30}, "holds 80 tokens .* asks for 200"),
        ({"kv_cache_gib": 1e-9}, "holds 0 tokens"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"device": "meta"}, "runs on cpu and cuda"),
    ],
)
def test_what_cannot_be_served_is_said(changes: dict[str, object], words: str, tiny_model: TinyModels) -> None:
    with pytest.raises(EngineError, match=words):
        build(tiny_model("llama")[0], **changes)


def test_blocks_stay_within_free_memory(tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_free_bytes", lambda device: 10 * BLOCK_BYTES)
    assert build(tiny_model("llama")[0]).facts.num_blocks == 9


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_gpu_is_said(tiny_model: TinyModels) -> None:
    with pytest.raises(EngineError, match="torch finds no CUDA device"):
        build(tiny_model("llama")[0], device="cuda")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_of_the_self_check_equals_transformers(name: str, tiny_model: TinyModels) -> None:
    folder, oracle = tiny_model(name)
    tokens = random_tokens(40, seed=1)
    logits = reference_logits(Checkpoint(folder), read_spec(folder), torch.device("cpu"))(tokens, 8)
    torch.testing.assert_close(logits, oracle_logits(oracle, tokens)[-8:], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "mistral with window", "qwen3 tied", "dynamic rope"])
def test_a_sound_engine_passes_its_self_check(name: str, dtype: str, tiny_model: TinyModels) -> None:
    facts = build(tiny_model(name)[0], self_check=True, dtype=dtype).facts
    assert facts.self_check.startswith("passed: 8 tokens after 96")


def test_a_context_without_room_skips_the_self_check(tiny_model: TinyModels) -> None:
    facts = build(tiny_model("llama")[0], self_check=True, max_model_len=8).facts
    assert facts.self_check.startswith("skipped")


class WrongBeyond32:
    """A back end whose prefill of more than 32 tokens is wrong: it forgets the first of them."""

    def __init__(self, folder: Path) -> None:
        self.inner = build(folder).core.runner

    def execute(self, plan: Plan) -> StepResult:
        result = self.inner.execute(plan)
        (item,) = plan.items
        if item.num_tokens > 32:
            cache = self.inner._cache  # type: ignore[attr-defined]
            for layer in cache.layers:
                layer.values.view(cache.num_blocks, -1)[item.seq.block_ids[0]] = 0.5
        return result


def test_a_wrong_long_prefill_fails_the_self_check(tiny_model: TinyModels) -> None:
    folder, _ = tiny_model("llama")
    reference = reference_logits(Checkpoint(folder), read_spec(folder), torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        subject = CheckSubject(WrongBeyond32(folder), 64, 16, 256, dtype)
        with pytest.raises(EngineError, match="the self-check failed: in torch"):
            self_check(subject, reference, VOCAB)


@pytest.mark.parametrize(("has_kernels", "words"), [(True, "engine.kernels: none, or another"), (False, "another")])
def test_a_failed_self_check_names_what_may_help(has_kernels: bool, words: str, tiny_model: TinyModels) -> None:
    folder, _ = tiny_model("llama")
    subject = CheckSubject(build(folder).core.runner, 64, 16, 256, torch.float32, has_kernels=has_kernels)
    with pytest.raises(EngineError, match=rf"\); {words} dtype,? may be right on this machine"):
        self_check(subject, lambda tokens, num_last: torch.zeros(num_last, VOCAB), VOCAB)


def test_an_engine_that_gives_nan_fails_the_self_check(tiny_model: TinyModels) -> None:
    folder, _ = tiny_model("llama")
    subject = CheckSubject(build(folder).core.runner, 64, 16, 256, torch.float32)
    with pytest.raises(EngineError, match="nan"):
        self_check(subject, lambda tokens, num_last: torch.full((num_last, VOCAB), float("nan")), VOCAB)


async def test_the_threaded_engine_answers_and_closes(tiny_model: TinyModels) -> None:
    folder, oracle = tiny_model("llama")
    ended = asyncio.Event()
    deltas: list[StepDelta] = []

    def sink(step: object) -> None:
        deltas.extend(step)  # type: ignore[call-overload]
        if deltas[-1].finish_reason is not None:
            ended.set()

    engine = native_engine(folder, EngineConfig(), "tested", time.monotonic)
    try:
        facts = await engine.start(sink)
        assert facts.self_check.startswith("passed")
        prompt = random_tokens(20, seed=2)
        engine.submit(make_request("a", prompt, max_tokens=1))
        await asyncio.wait_for(ended.wait(), 30)
        assert [t for d in deltas for t in d.token_ids] == [int(oracle_logits(oracle, prompt)[-1].argmax())]
        assert deltas[-1].finish_reason == "length"
    finally:
        await engine.close()


async def test_a_broken_model_is_an_engine_error_at_start(tmp_path: Path) -> None:
    engine = native_engine(tmp_path, EngineConfig(), "tested")
    with pytest.raises(EngineError, match=r"config\.json is missing"):
        await engine.start(lambda deltas: None)
    await engine.close()
