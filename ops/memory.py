"""How much memory a replica will want, from its files and its profile alone."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.check import Problem
from configs.errors import ConfigError
from configs.schema import Config, EngineConfig, GroupConfig, ModelConfig
from configs.tokenizer import find_model

if TYPE_CHECKING:
    from ops.doctor import Status

GIB = 1 << 30
BASE_BYTES = {"native": 600 << 20, "vllm": 2500 << 20, "sim": 250 << 20}
"""A replica's process before weights and KV: Python, Ray's worker and, for the in-house engine, torch and activations.
Measured after the imports and the tokenizer: 407 MiB and 191 MiB; vLLM's three processes take 2.1 GiB together."""

BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2, "F32": 4, "BF16": 2, "F16": 2}
ROUNDED_BYTES = {"int8": 1.05, "w8a8": 1.05, "fp8": 1.05, "int4": 0.65, "nf4": 0.65, "bitsandbytes": 0.65}
"""Bytes a weight of what `engine.quantization` rounds plain weights to, scales included."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one replica of a group needs, and whether its KV cache is of use."""

    replica_bytes: int
    status: Status
    detail: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The parts of config.json that decide sizes, and the weights as they lie on disk. `values_per_rank`: numbers of
    one rank of a LoRA adapter of everything, in one layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    dtype: str
    weight_bytes: int
    is_quantised: bool = False
    values_per_rank: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    vocab_size: int = 0

    @classmethod
    def read(cls, folder: Path) -> ModelShape:
        """Raises ConfigError when config.json lacks what is needed."""
        try:
            config: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
            text = config.get("text_config", config)
            heads = text["num_attention_heads"]
            return cls(
                num_layers=text["num_hidden_layers"],
                num_kv_heads=text.get("num_key_value_heads") or heads,
                head_dim=text.get("head_dim") or text["hidden_size"] // heads,
                max_model_len=text["max_position_embeddings"],
                dtype=str(text.get("dtype") or text.get("torch_dtype") or "float32"),
                weight_bytes=sum(path.stat().st_size for path in _weight_files(folder)),
                is_quantised="quantization_config" in config or not any(folder.glob("*.safetensors")),
                values_per_rank=_values_per_rank(text),
                hidden_size=text.get("hidden_size") or 0,
                intermediate_size=text.get("intermediate_size") or 0,
                vocab_size=text.get("vocab_size") or 0,
            )
        except KeyError as error:
            raise ConfigError(f"{folder / 'config.json'} has no {error}") from error
        except (OSError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise ConfigError(f"{folder / 'config.json'} is no model's: {error}") from error

    def weights_in(self, dtype: str, quantization: str | None = None) -> int:
        """Bytes of the weights held as `dtype` (`auto` = as they lie), or rounded; quantised ones stay as they lie."""
        if self.is_quantised:
            return self.weight_bytes
        if quantization in ROUNDED_BYTES:
            return int(self.weight_bytes / self._size("auto") * ROUNDED_BYTES[quantization])
        return self.weight_bytes * self._size(dtype) // self._size("auto")

    def kv_bytes_per_token(self, dtype: str, kv_cache_dtype: str = "auto") -> int:
        """Of keys and values; one of 8 bits takes a byte, and in int8 each head of a token two more for its scale."""
        row = self.head_dim * self._size(dtype)
        if kv_cache_dtype != "auto":
            row = self.head_dim + (2 if kv_cache_dtype == "int8" else 0)
        return 2 * self.num_layers * self.num_kv_heads * row

    def lora_bytes(self, engine: EngineConfig, dtype: str) -> int:
        """The pool of adapters at most: what the profile allows, or what the slots can use."""
        kept = dtype if engine.lora_dtype == "auto" else engine.lora_dtype
        page = self.num_layers * self.values_per_rank * self._size(kept)
        pool = int(engine.lora_pool_gib * GIB)
        return min(pool, (1 + engine.max_adapters * engine.max_lora_rank) * page) if page else pool

    def _size(self, dtype: str) -> int:
        return BYTES_OF.get(self.dtype if dtype == "auto" else dtype, 4)


def _values_per_rank(config: dict[str, Any]) -> int:
    """Inputs and outputs of the seven modules of a layer; 0 where config.json does not tell."""
    hidden, inner, heads = (config.get(k, 0) for k in ("hidden_size", "intermediate_size", "num_attention_heads"))
    if not (hidden and inner and heads):
        return 0
    head_dim = config.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    return int((3 * hidden + q + 2 * kv) + (q + hidden) + (2 * hidden + 2 * inner) + (inner + hidden))


def _weight_files(folder: Path) -> list[Path]:
    """What the engine would read: safetensors, or a GGUF where there are none."""
    return list(folder.glob("*.safetensors")) or list(folder.glob("*.gguf"))


def group_memory(group: GroupConfig, model: ModelConfig, home: Path) -> Estimate:
    """The arithmetic for one replica of a group. Raises ConfigError when the model's files cannot be read."""
    engine = group.engine
    if engine.kind == "openai":
        assert engine.upstream is not None, "the profile's checks have looked"
        return Estimate(BASE_BYTES["sim"], "ok", f"a server of its own at {engine.upstream.url}")
    if engine.kind == "sim":
        held = engine.sim.num_blocks * engine.block_size
        return Estimate(BASE_BYTES["sim"], "ok", f"a sim replica: {held:,} pretended KV tokens, no weights")
    shape = ModelShape.read(find_model(model.source, home))
    dtype = _resolved_dtype(group)
    weights, longest = shape.weights_in(dtype, engine.quantization), _longest(engine, shape)
    a_token = shape.kv_bytes_per_token(dtype, engine.kv_cache_dtype)
    if drafter := draft_shape(engine, home):
        weights += drafter.weights_in(dtype)
        a_token += drafter.kv_bytes_per_token(dtype, engine.kv_cache_dtype)
    kv_bytes = min(int(engine.kv_cache_gib * GIB), engine.max_num_seqs * longest * a_token)  # more is never used
    tokens = kv_bytes // a_token
    detail = f"a replica: weights {weights / GIB:.2f} GiB, KV {kv_bytes / GIB:.2f} GiB = {tokens:,} tokens"
    needed = BASE_BYTES[engine.kind] + weights + kv_bytes
    if engine.max_adapters:
        needed += (lora := shape.lora_bytes(engine, dtype))
        detail += f", LoRA {lora / GIB:.2f} GiB"
    if tokens < longest:
        advice = f"raise engine.kv_cache_gib, or set engine.max_model_len to {tokens} at most"
        refused = engine.kind == "vllm" and _is_on_cpu(group)  # it does not start then
        return Estimate(needed, "fail" if refused else "warn", f"{detail}, fewer than {longest:,}", advice)
    return Estimate(needed, "ok", f"{detail} (longest request {longest:,})")


def draft_shape(engine: EngineConfig, home: Path) -> ModelShape | None:
    """The model that guesses, where it shares a replica's KV cache, as vLLM's does. Raises ConfigError."""
    guessing = engine.speculative
    if engine.kind != "vllm" or guessing is None or guessing.method != "draft_model" or guessing.model is None:
        return None
    return ModelShape.read(find_model(guessing.model, home))


def main_memory(config: Config, home: Path) -> dict[int, int]:
    """Bytes that the replicas of each group need together, by the group's number: those that run without a GPU, as far
    as their models' files can be read."""
    found = {}
    for i, group in enumerate(config.groups):
        model = config.model_named(group.model)
        assert model is not None, f"{group.model=} passed the checks"
        split = group.engine.vllm.tensor_parallel_size * group.engine.vllm.pipeline_parallel_size > 1
        if not (group.resources.num_gpus or split or group.engine.device.startswith("cuda")):
            with suppress(ConfigError):
                found[i] = group.replicas * group_memory(group, model, home).replica_bytes
    return found


def beyond_memory(config: Config, home: Path, total_bytes: int) -> Problem | None:
    """What is wrong with a profile whose replicas need more than the machine has."""
    needed = main_memory(config, home)
    if sum(needed.values()) <= total_bytes:
        return None
    reason = (
        f"replicas need about {sum(needed.values()) / GIB:.1f} GiB of the machine's {total_bytes / GIB:.1f}: take "
        "fewer replicas, or a smaller engine.kv_cache_gib (warmgate doctor has the sums)"
    )
    return Problem(("groups", max(needed, key=needed.__getitem__), "engine", "kv_cache_gib"), reason)


def _resolved_dtype(group: GroupConfig) -> str:
    """What the engine makes of `auto`: float32 on a CPU, the files' own elsewhere."""
    return "float32" if group.engine.dtype == "auto" and _is_on_cpu(group) else group.engine.dtype


def _is_on_cpu(group: GroupConfig) -> bool:
    split = group.engine.vllm.tensor_parallel_size * group.engine.vllm.pipeline_parallel_size > 1
    has_card = group.resources.num_gpus > 0 or split  # a bundle with a card for each part of a split model
    return group.engine.device == "cpu" or (group.engine.device == "auto" and not has_card)


def _longest(engine: EngineConfig, shape: ModelShape) -> int:
    return min(engine.max_model_len or shape.max_model_len, shape.max_model_len)
