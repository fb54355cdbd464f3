"""The memory arithmetic of docs/engine.md, against what the cache really allocates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ops.memory import ModelShape
from replicas.engine.attention import KvCache, KvGeometry, block_bytes
from replicas.engine.families import DecoderSpec, read_spec
from replicas.engine.kv_rows import KvDtype

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
BLOCK = 16


def allocated(spec: DecoderSpec, num_tokens: int, stored: KvDtype) -> int:
    """Bytes of all tensors of a cache for so many tokens; torch's meta device allocates in numbers only."""
    meta = torch.device("meta")
    geometry = KvGeometry.of(spec, BLOCK, torch.bfloat16, meta).storing(stored)
    cache = KvCache(geometry, spec.num_layers, num_tokens // BLOCK)
    return sum(tensor.nbytes for layer in cache.layers for tensor in layer.tensors)


@pytest.fixture
def spec(tmp_path: Path) -> DecoderSpec:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return read_spec(tmp_path)


def test_llama_3_8b_at_8192_tokens_takes_1_07_gb(spec: DecoderSpec) -> None:
    formula = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 8192 * 2
    assert formula == 2 * 32 * 8 * 128 * 8192 * 2 == 1_073_741_824
    assert allocated(spec, 8192, "auto") == formula
    assert block_bytes(spec, BLOCK, torch.bfloat16) * (8192 // BLOCK) == formula


@pytest.mark.parametrize(("stored", "share"), [("fp8", 0.5), ("int8", 0.5 * (1 + 2 / 128))])
def test_a_cache_of_8_bits_takes_half_and_scales_where_it_has_them(
    spec: DecoderSpec, stored: KvDtype, share: float
) -> None:
    assert allocated(spec, 8192, stored) == round(share * allocated(spec, 8192, "auto"))
    assert block_bytes(spec, BLOCK, torch.bfloat16, stored) * (8192 // BLOCK) == allocated(spec, 8192, stored)


def test_doctor_reckons_as_the_cache_does(spec: DecoderSpec) -> None:
    shape = ModelShape(spec.num_layers, spec.num_kv_heads, spec.head_dim, 8192, "bfloat16", 0)
    for stored in ("auto", "int8", "fp8"):
        assert shape.kv_bytes_per_token("bfloat16", stored) * 8192 == allocated(spec, 8192, stored)  # type: ignore[arg-type]
