"""What config.json says, in old and new spelling, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from replicas.contract import EngineError
from replicas.engine.families import DecoderSpec, read_spec, spec_from_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def spec(**changes: Any) -> DecoderSpec:
    return spec_from_config({**LLAMA, **changes})


def test_absent_fields_take_the_familys_meaning() -> None:
    plain = spec()
    assert (plain.num_kv_heads, plain.head_dim, plain.max_len, plain.dtype) == (8, 8, 8192, "float32")
    assert plain.windows == (None, None) and not plain.qkv_bias and not plain.tied_embeddings
    assert plain.rope.kind == "default" and plain.rope.theta == 10000.0


def test_both_spellings_of_rope_scaling_mean_the_same() -> None:
    old = spec(rope_theta=500000.0, rope_scaling=LLAMA3, max_position_embeddings=131072)
    older = spec(
        rope_theta=500000.0, rope_scaling={**LLAMA3, "type": LLAMA3["rope_type"]}, max_position_embeddings=131072
    )
    new = spec(rope_parameters={**LLAMA3, "rope_theta": 500000.0}, max_position_embeddings=131072)
    assert old == new == older
    assert new.rope.kind == "llama3" and new.rope.factor == 8.0 and new.max_len == 131072


@pytest.mark.parametrize(
    ("scaling", "max_len"),
    [
        ({"type": "linear", "factor": 4.0}, 32768),
        ({"type": "dynamic", "factor": 2.0}, 16384),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}, 32768),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}, 8192),
    ],
)
def test_scaling_stretches_the_longest_context(scaling: dict[str, Any], max_len: int) -> None:
    assert spec(rope_scaling=scaling).max_len == max_len


def test_mistral_slides_in_every_layer_and_qwen_where_told() -> None:
    assert spec(architectures=["MistralForCausalLM"], sliding_window=4096).windows == (4096, 4096)
    assert spec(architectures=["MistralForCausalLM"], sliding_window=None).windows == (None, None)
    qwen: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64}
    assert spec(**qwen, use_sliding_window=False).windows == (None, None)
    assert spec(**qwen, use_sliding_window=True, max_window_layers=1).windows == (None, 64)
    assert spec(**qwen, use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]).windows == (
        64,
        None,
    )


def test_qwen_differs_in_biases_and_norms() -> None:
    qwen2, qwen3 = spec(architectures=["Qwen2ForCausalLM"]), spec(architectures=["Qwen3ForCausalLM"], head_dim=128)
    assert qwen2.qkv_bias and not qwen2.output_bias and not qwen2.qk_norm
    assert not qwen3.qkv_bias and qwen3.qk_norm and qwen3.head_dim == 128


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "unknown architecture"),
        ({"architectures": None}, "unknown architecture"),
        ({"hidden_act": "gelu"}, "unknown activation 'gelu'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "unknown rope scaling 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer"),
        ({"partial_rotary_factor": 0.5}, "part of the head"),
    ],
)
def test_what_the_engine_does_not_have_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        spec(**changes)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(EngineError, match="LlamaForCausalLM lacks 'hidden_size'"):
        spec_from_config({key: value for key, value in LLAMA.items() if key != "hidden_size"})


def test_end_tokens_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 2}))
    assert read_spec(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert read_spec(tmp_path).eos_token_ids == (2, 5)


def test_a_missing_or_broken_config_is_an_engine_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="is missing"):
        read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EngineError, match="is not JSON"):
        read_spec(tmp_path)
