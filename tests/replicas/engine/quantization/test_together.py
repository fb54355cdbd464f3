"""Quantised weights and caches beside the engine's other features: adapters, speculation, resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.schema import SpeculativeConfig
from replicas.contract import pack_tokens
from replicas.engine.kernels.library import Kernels
from tests.replicas.engine.driver import Answer, build, make_request, run
from tests.replicas.engine.lora_kit import Written, write_adapter
from tests.replicas.engine.quantization.quantised_kit import ON_THE_FLY, make_plain, meant
from tests.replicas.engine.tiny import oracle_logits, random_tokens

SMALL: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 6, "max_model_len": 160}
SETTINGS: dict[str, dict[str, Any]] = {
    "int4": {**ON_THE_FLY["int4"]},
    "int8 with its head, int8 cache": {**ON_THE_FLY["int8 with its head"], "kv_cache_dtype": "int8"},
    "nf4, fp8 cache": {**ON_THE_FLY["nf4"], "kv_cache_dtype": "fp8"},
}
EACH = pytest.mark.parametrize("name", SETTINGS)
WITH_AND_WITHOUT = pytest.mark.parametrize("compiled", ["auto", "none"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain("llama", tmp_path_factory.mktemp("plain"))


def tokens_of(answers: dict[str, Answer]) -> dict[str, list[int]]:
    return {name: answer.tokens for name, answer in answers.items()}


@WITH_AND_WITHOUT
@EACH
def test_speculation_changes_no_token(name: str, compiled: str, folder: Path, kernels: Kernels) -> None:
    settings = {**SMALL, **SETTINGS[name], "kernels": compiled}
    prompts = [make_request(str(n), random_tokens(n, n) * 3, max_tokens=40) for n in (4, 9, 17)]
    plain = build(folder, **settings).core
    guessing = build(folder, **settings, speculative=SpeculativeConfig("ngram", adaptive=False)).core
    assert tokens_of(run(guessing, prompts)) == tokens_of(run(plain, prompts))


@WITH_AND_WITHOUT
def test_adapters_are_added_to_what_quantised_weights_give(
    compiled: str, folder: Path, tmp_path: Path, kernels: Kernels
) -> None:
    scheme = {**ON_THE_FLY["int4"], "head_quantization": "none"}
    floats = meant(folder, folder, tmp_path / "floats", **scheme)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32).eval()
    adapters: dict[str, Written] = {f"a{r}": write_adapter(tmp_path / f"a{r}", model, rank=r) for r in (4, 16)}
    core = build(folder, **SMALL, **scheme, kernels=compiled, max_adapters=4, max_lora_rank=16).core
    for adapter, written in adapters.items():
        core.load_adapter(written.spec(adapter))
    prompt = random_tokens(30, 7)
    names = [None, *adapters]
    answers = run(core, [make_request(str(n), prompt, adapter=n, prompt_logprobs=0) for n in names])
    for n in names:
        oracle = model if n is None else adapters[n].merged(model)
        expected = torch.log_softmax(oracle_logits(oracle, prompt), dim=-1)[torch.arange(29), prompt[1:]]
        found = [entry.logprob for entry in answers[str(n)].prompt_logprobs or () if entry is not None]
        assert (torch.tensor(found) - expected).abs().max() < 1e-2, n


@EACH
def test_cache_hits_and_resumption_change_no_token(name: str, folder: Path, kernels: Kernels) -> None:
    settings = {**SMALL, **SETTINGS[name]}
    prompts = [make_request(str(n), random_tokens(n, n), max_tokens=30, temperature=0.8) for n in (8, 33, 50)]
    core = build(folder, **settings).core
    cold, warm = run(core, prompts), run(core, prompts)
    assert tokens_of(cold) == tokens_of(warm)
    assert all(answer.num_cached for answer in warm.values())
    halves = []
    for n in (8, 33, 50):
        done = pack_tokens(cold[str(n)].tokens[:11])
        halves.append(make_request(str(n), random_tokens(n, n), max_tokens=30, temperature=0.8, produced=done))
    resumed = run(build(folder, **settings).core, halves)
    assert {n: cold[n].tokens[:11] + answer.tokens for n, answer in resumed.items()} == tokens_of(cold)
