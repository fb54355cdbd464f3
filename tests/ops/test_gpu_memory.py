"""GPU memory, reckoned before anything starts: shapes of real models, files that only have their size."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from configs.load import load_profile
from configs.schema import EngineConfig, GroupConfig, ModelConfig, ResourcesConfig, VllmConfig
from ops.gpu_memory import Card, group_on_card, needs_gpu, plan
from ops.memory import GIB, ModelShape

LLAMA_8B = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}  # fmt: skip


def folder_of(tmp_path: Path, num_bytes: int, **more: object) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | more))
    (tmp_path / "tokenizer.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(num_bytes)
    return tmp_path


def group(**engine: object) -> GroupConfig:
    vllm = engine.pop("vllm", VllmConfig())
    settings = {"max_model_len": 8192, "max_num_batched_tokens": 2048} | engine
    config = EngineConfig(kind="vllm", vllm=vllm, **settings)
    return GroupConfig(name="g", model="m", resources=ResourcesConfig(num_gpus=1), engine=config)


def test_what_eight_billion_weights_leave_of_an_80_gib_card_is_kv_cache(tmp_path: Path) -> None:
    shape = ModelShape.read(folder_of(tmp_path, 16_060_000_000))
    found = plan(group(), shape, Card(80 * GIB))
    assert found.weights == 16_060_000_000
    assert found.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert found.room == int(80 * GIB * 0.9) - found.weights - found.activations - found.graphs
    assert found.kv_tokens == found.room // 131_072 > 400_000


def test_tensor_parallelism_splits_weights_and_kv_heads(tmp_path: Path) -> None:
    shape = ModelShape.read(folder_of(tmp_path, 16_060_000_000))
    one, two = (plan(group(vllm=VllmConfig(tensor_parallel_size=n)), shape, Card(40 * GIB)) for n in (1, 2))
    assert two.weights == one.weights // 2
    assert two.kv_bytes_per_token == one.kv_bytes_per_token // 2
    sixteen = plan(group(vllm=VllmConfig(tensor_parallel_size=16)), shape, Card(40 * GIB))
    assert sixteen.kv_bytes_per_token == one.kv_bytes_per_token // 8  # copies of the eight heads


def test_what_does_not_fit_says_what_would(tmp_path: Path) -> None:
    model = ModelConfig(id="m", source=str(folder_of(tmp_path, 16_060_000_000)))
    estimate = group_on_card(group(), model, tmp_path, Card(16 * GIB))
    assert estimate.status == "fail"
    assert "engine.vllm.tensor_parallel_size 2" in estimate.advice and "cards with" in estimate.advice
    fits = group_on_card(group(vllm=VllmConfig(tensor_parallel_size=2)), model, tmp_path, Card(16 * GIB))
    assert fits.status == "ok" and "2 x 16 GiB" in fits.detail


def test_a_shorter_context_is_offered_where_it_is_enough(tmp_path: Path) -> None:
    model = ModelConfig(id="m", source=str(folder_of(tmp_path, 16_060_000_000)))
    estimate = group_on_card(group(max_model_len=131072, max_num_seqs=16), model, tmp_path, Card(24 * GIB))
    assert estimate.status == "fail"
    shorter = int(estimate.advice.split("engine.max_model_len ")[1].split()[0])
    again = group_on_card(group(max_model_len=shorter, max_num_seqs=16), model, tmp_path, Card(24 * GIB))
    assert again.status == "ok"


@pytest.mark.parametrize(("settings", "expected"), [({}, True), ({"device": "cpu"}, False)])
def test_groups_with_gpus_are_reckoned(settings: dict[str, object], expected: bool) -> None:
    assert needs_gpu(group(**settings)) == expected
    assert needs_gpu(msgspec.structs.replace(group(**settings), resources=ResourcesConfig())) is False


def test_the_profile_for_gpus_reckons_with_its_cards() -> None:
    profile = load_profile("vllm-awq-tp", {})
    assert needs_gpu(profile.config.groups[0])
