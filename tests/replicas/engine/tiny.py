"""Tiny random models of every family, with transformers as the oracle, and a decoder driven by hand."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from replicas.contract import GenerateRequest, SamplingParams, pack_tokens
from replicas.engine.attention import DecodeKernel, GatherDecode, KvCache, KvGeometry, SparseDecode
from replicas.engine.batch import Batcher
from replicas.engine.families import read_spec
from replicas.engine.model import Decoder
from replicas.engine.prefill import ChunkKernel, FusedChunk, TiledChunk
from replicas.engine.rope import rope_table
from replicas.engine.sequence import Plan, PlanItem
from replicas.engine.sequence import Sequence as Request
from replicas.engine.weights import Checkpoint, WeightLoader

VOCAB = 97
Kernels: TypeAlias = tuple[DecodeKernel, ChunkKernel]
IN_PLACE: Kernels = (SparseDecode, TiledChunk)
GATHERED: Kernels = (GatherDecode, FusedChunk)
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama with biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama without GQA": (LlamaConfig, {"num_key_value_heads": 6}),
    "llama with one KV head": (LlamaConfig, {"num_key_value_heads": 1}),
    "llama3 rope": (LlamaConfig, _rope(rope_type="llama3", **_LLAMA3)),
    "linear rope": (LlamaConfig, _rope(rope_type="linear", factor=4.0)),
    "yarn rope": (LlamaConfig, _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)),
    "yarn rope with mscale": (
        LlamaConfig,
        _rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, mscale=1.2, mscale_all_dim=0.8),
    ),
    "dynamic rope": (LlamaConfig, _rope(rope_type="dynamic", factor=2.0)),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral with window": (MistralConfig, {"sliding_window": 11}),
    "qwen2": (Qwen2Config, {}),
    "qwen2 with some windows": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {}),
    "qwen3 tied": (Qwen3Config, {"tie_word_embeddings": True}),
}


def make_tiny(name: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """Saves a random model of a family into `folder` and returns transformers' view of it."""
    config_class, settings = FAMILIES[name]
    torch.manual_seed(3)
    config = config_class(**{**_COMMON, **settings, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Norms and biases start as ones and zeros: a mix-up would not show.
            if key.endswith("bias") or "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def oracle_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """[num_tokens, vocab], in one pass of transformers."""
    logits: Tensor = model(torch.tensor([list(tokens)])).logits[0]
    return logits


def random_tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB), k=count)


def make_sequence(tokens: Sequence[int], request_id: str = "a", **sampling: Any) -> Request:
    defaults: dict[str, Any] = {"max_tokens": 32, "seed": 1, "temperature": 0.0}
    params = SamplingParams(**{**defaults, **sampling})
    return Request.from_request(
        GenerateRequest(request_id=request_id, prompt=pack_tokens(tokens), sampling=params), 0.0
    )


@dataclass
class ByHand:
    """A decoder whose blocks and steps a test chooses: `step` gives the logits of every row."""

    decoder: Decoder
    cache: KvCache
    batcher: Batcher

    @classmethod
    def load(cls, folder: Path, kernels: Kernels, dtype: torch.dtype = torch.float32) -> ByHand:
        spec, device = read_spec(folder), torch.device("cpu")
        weights = WeightLoader(Checkpoint(folder), spec, dtype, device).load()
        geometry = KvGeometry.of(spec, 4, dtype, device)
        return cls(
            Decoder(spec, weights, rope_table(spec.rope, spec.head_dim, spec.max_len)),
            KvCache(geometry, spec.num_layers, 256),
            Batcher(geometry, *kernels, frozenset(spec.windows)),
        )

    @torch.inference_mode()
    def step(self, *work: tuple[Request, int, int]) -> list[Tensor]:
        """Computes tokens [start, end) of each sequence in one step → the logits of each, [end - start, vocab]."""
        plan = Plan(tuple(PlanItem(seq, start, end - start, samples=False) for seq, start, end in work))
        batch = self.batcher.build(plan)
        windows, layers = self.decoder.spec.windows, self.cache.layers
        hidden = self.decoder.hidden(
            batch.token_ids, batch.positions, lambda i, qkv: batch.views[windows[i]](qkv, layers[i])
        )
        logits = self.decoder.logits(hidden)
        return [logits[first : last + 1] for first, last in zip(batch.first_rows, batch.last_rows, strict=True)]


def scattered_tables(*seqs: Request, capacity: int) -> None:
    """Gives sequences blocks in no order, none shared."""
    ids: Iterator[int] = iter(random.Random(5).sample(range(256), k=256))
    for seq in seqs:
        seq.block_ids = [next(ids) for _ in range(-(-capacity // 4))]
