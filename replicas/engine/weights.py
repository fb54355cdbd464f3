"""Weights from safetensors files, mapped into memory: a tensor is read when asked for, converted and laid out once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from replicas.contract import EngineError
from replicas.engine.families import DecoderSpec
from replicas.engine.linear import Linear, make_linear
from replicas.engine.rope import pair_order

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Heads of q and k are in `pair_order`; `q_norm` and `k_norm` too."""

    input_norm: Tensor  # [hidden]
    qkv: Linear  # hidden → (num_heads + 2 num_kv_heads) * head_dim: q, k, v
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    output: Linear  # num_heads * head_dim → hidden
    mlp_norm: Tensor  # [hidden]
    gate_up: Linear  # hidden → 2 * intermediate: gate, up
    down: Linear  # intermediate → hidden


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole decoder, on one device in one dtype."""

    embedding: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    head: Linear  # hidden → vocab


class Checkpoint:
    """The tensors of a model folder by name. Files stay mapped as long as the checkpoint lives."""

    def __init__(self, model_dir: Path) -> None:
        self._file_of = _index(model_dir)
        self._open: dict[Path, Any] = {}

    def get(self, name: str) -> Tensor:
        """A tensor as stored, its pages still on disk. Raises EngineError naming what is missing or broken."""
        path = self._file_of.get(name)
        if path is None:
            raise EngineError(f"the checkpoint has no tensor {name!r}")
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            tensor: Tensor = self._open[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise EngineError(f"{path} cannot be read: {error}") from error
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._file_of


def _index(model_dir: Path) -> dict[str, Path]:
    index = model_dir / _INDEX
    try:
        if index.is_file():
            names: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return {name: model_dir / file for name, file in names.items()}
        files = [model_dir / _SINGLE] if (model_dir / _SINGLE).is_file() else sorted(model_dir.glob("*.safetensors"))
        if not files:
            raise EngineError(f"{model_dir} holds no *.safetensors")
        found: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                found.update(dict.fromkeys(opened.keys(), file))
        return found
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise EngineError(f"the weights in {model_dir} cannot be read: {type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True)
class WeightLoader:
    """Turns a checkpoint into `DecoderWeights`: one tensor at a time is held twice, never the model."""

    checkpoint: Checkpoint
    spec: DecoderSpec
    dtype: torch.dtype
    device: torch.device

    def load(self) -> DecoderWeights:
        """Reads everything. Raises EngineError for a missing tensor or a shape that config.json does not imply."""
        spec = self.spec
        embedding = self._tensor("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
        head = embedding if self._is_tied() else self._tensor("lm_head.weight", (spec.vocab_size, spec.hidden_size))
        return DecoderWeights(
            embedding=embedding,
            layers=tuple(self._layer(f"model.layers.{i}.") for i in range(spec.num_layers)),
            norm=self._tensor("model.norm.weight", (spec.hidden_size,)),
            head=make_linear(head),
        )

    def _is_tied(self) -> bool:
        return self.spec.tied_embeddings or "lm_head.weight" not in self.checkpoint

    def _layer(self, prefix: str) -> LayerWeights:
        spec = self.spec
        hidden, heads = spec.hidden_size, (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv = [
            (attention + name, count * spec.head_dim)
            for name, count in zip(("q_proj", "k_proj", "v_proj"), heads, strict=True)
        ]
        gate_up = [(mlp + name, spec.intermediate_size) for name in ("gate_proj", "up_proj")]
        return LayerWeights(
            input_norm=self._tensor(prefix + "input_layernorm.weight", (hidden,)),
            qkv=self._fused(qkv, hidden, spec.qkv_bias, rotated=2),
            q_norm=self._head_norm(attention + "q_norm.weight"),
            k_norm=self._head_norm(attention + "k_norm.weight"),
            output=self._fused([(attention + "o_proj", hidden)], spec.num_heads * spec.head_dim, spec.output_bias),
            mlp_norm=self._tensor(prefix + "post_attention_layernorm.weight", (hidden,)),
            gate_up=self._fused(gate_up, hidden, spec.mlp_bias),
            down=self._fused([(mlp + "down_proj", hidden)], spec.intermediate_size, spec.mlp_bias),
        )

    def _fused(self, parts: list[tuple[str, int]], in_features: int, has_bias: bool, rotated: int = 0) -> Linear:
        """One product out of several with the same input; the first `rotated` parts get their heads in pair order."""
        total = sum(rows for _, rows in parts)
        weight = torch.empty(total, in_features, dtype=self.dtype, device=self.device)
        bias = torch.empty(total, dtype=self.dtype, device=self.device) if has_bias else None
        start = 0
        for i, (name, rows) in enumerate(parts):
            weight[start : start + rows] = self._rows(name + ".weight", (rows, in_features), i < rotated)
            if bias is not None:
                bias[start : start + rows] = self._rows(name + ".bias", (rows,), i < rotated)
            start += rows
        return make_linear(weight, bias)

    def _rows(self, name: str, shape: tuple[int, ...], rotated: bool) -> Tensor:
        tensor = self._checked(name, shape)
        if not rotated:
            return tensor
        heads = tensor.view(-1, self.spec.head_dim, *shape[1:])
        return heads[:, pair_order(self.spec.head_dim)].flatten(0, 1)

    def _head_norm(self, name: str) -> Tensor | None:
        if not self.spec.qk_norm:
            return None
        return self._tensor(name, (self.spec.head_dim,))[pair_order(self.spec.head_dim).to(self.device)]

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._checked(name, shape).to(device=self.device, dtype=self.dtype)

    def _checked(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.checkpoint.get(name)
        if tuple(tensor.shape) != shape:
            raise EngineError(f"{name} has shape {tuple(tensor.shape)}, config.json implies {shape}")
        return tensor
