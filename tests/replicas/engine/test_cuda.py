"""The same engine on a GPU: the code is one, so the answers must be those of the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.replicas.engine.conftest import TinyModels
from tests.replicas.engine.driver import build, make_request, run
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
