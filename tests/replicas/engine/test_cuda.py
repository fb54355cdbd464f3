"""The same engine on a GPU: the code is one, so the answers must be those of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from replicas.engine import engine
from replicas.engine.families import read_spec
from replicas.engine.lora.layout import shapes_of
from replicas.engine.lora.pool import page_bytes
from tests.replicas.engine.conftest import TinyModels
from tests.replicas.engine.driver import build, make_request, run
from tests.replicas.engine.lora_kit import write_adapter
from tests.replicas.engine.tiny import random_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]


@pytest.mark.parametrize("family", ["llama", "mistral with window", "qwen3 tied", "dynamic rope"])
def test_greedy_tokens_on_cuda_equal_the_cpus(family: str, tiny_model: TinyModels) -> None:
    folder = tiny_model(family)[0]
    prompts = [random_tokens(length, seed=length) for length in (1, 15, 16, 17, 100, 180)]
    requests = [make_request(str(i), prompt, max_tokens=24) for i, prompt in enumerate(prompts)]
    settings = {"dtype": "float32", "max_num_batched_tokens": 48}
    on_cpu = run(build(folder, device="cpu", **settings).core, requests)
    on_gpu = run(build(folder, device="cuda", **settings).core, requests)
    assert {i: a.tokens for i, a in on_gpu.items()} == {i: a.tokens for i, a in on_cpu.items()}


def test_sampled_tokens_on_cuda_repeat_by_seed_in_any_batch(tiny_model: TinyModels) -> None:
    folder = tiny_model("llama")[0]
    ask = [make_request(str(i), random_tokens(20, seed=i), temperature=1.0, seed=i, max_tokens=16) for i in range(6)]
    together = run(build(folder, device="cuda", dtype="float32").core, ask)
    alone = {r.request_id: run(build(folder, device="cuda", dtype="float32").core, [r])[r.request_id] for r in ask}
    assert {i: a.tokens for i, a in together.items()} == {i: a.tokens for i, a in alone.items()}


def test_preempted_requests_on_cuda_resume_with_identical_tokens(tiny_model: TinyModels) -> None:
    folder = tiny_model("llama")[0]
    requests = [make_request(str(i), random_tokens(60, seed=i), max_tokens=40) for i in range(6)]
    roomy = run(build(folder, device="cuda", dtype="float32").core, requests)
    block_bytes = 3 * 16 * 2 * 2 * 16 * 4
    scarce = build(folder, device="cuda", dtype="float32", kv_cache_gib=16 * block_bytes / 2**30)
    answers = run(scarce.core, requests)
    assert scarce.core.stats().num_preemptions > 0
    assert {i: a.tokens for i, a in answers.items()} == {i: a.tokens for i, a in roomy.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_engine_on_cuda_passes_its_self_check(dtype: str, tiny_model: TinyModels) -> None:
    facts = build(tiny_model("llama")[0], device="cuda", dtype=dtype, self_check=True).facts
    assert facts.device.startswith("cuda") and facts.self_check.startswith("passed")


def test_adapters_on_cuda_say_what_they_say_on_the_cpu(tiny_model: TinyModels, tmp_path: Path) -> None:
    """Ranks 4 to 128 in one batch, decoded and in chunks."""
    folder, model = tiny_model("llama")
    ranks = (4, 16, 48, 128)
    written = {f"r{rank}": write_adapter(tmp_path / str(rank), model, rank=rank) for rank in ranks}
    names = (None, *written)
    requests = [
        make_request(f"{name} {length}", random_tokens(length, seed=length), adapter=name)
        for name in names
        for length in (1, 17, 60)
    ]

    def said(device: str) -> dict[str, list[int]]:
        limits: dict[str, Any] = {"max_adapters": 4, "max_lora_rank": 128, "max_num_batched_tokens": 48}
        core = build(folder, device=device, dtype="float32", **limits).core
        for name, adapter in written.items():
            core.load_adapter(adapter.spec(name))
        return {name: answer.tokens for name, answer in run(core, requests).items()}

    assert said("cuda") == said("cpu")


def test_an_adapter_pool_on_cuda_is_not_taken_from_free_memory_twice(
    tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is already gone from what the device says is free."""
    folder = tiny_model("llama")[0]
    spec = read_spec(folder)
    pool_bytes = page_bytes(shapes_of(spec), spec.num_layers, torch.float32) * (1 + 2 * 16)
    monkeypatch.setattr(engine, "_free_bytes", lambda device: pool_bytes)
    facts = build(folder, device="cuda", dtype="float32", max_adapters=2, max_lora_rank=16).facts
    assert facts.num_blocks > 0
