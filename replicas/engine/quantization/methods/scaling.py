"""Moving size between activations and weights: columns of a matrix times s, what feeds them divided by s, nothing lost.

Both SmoothQuant and AWQ rest on it. What feeds a stage's columns: a norm's weight, v for the attention output (heads
that share a KV head share s), up for down (the gate multiplies after it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from replicas.engine.quantization.methods.textbook import (
    ATTENTION_NORM,
    DOWN,
    GATE_UP,
    MLP_NORM,
    OUTPUT,
    QKV,
    Layer,
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Modules whose input columns can be scaled, and what feeds them."""

    feeder: str
    modules: tuple[str, ...]


PAIRS = (
    Pair(ATTENTION_NORM, QKV),
    Pair(QKV[2], (OUTPUT,)),
    Pair(MLP_NORM, GATE_UP),
    Pair(GATE_UP[1], (DOWN,)),
)


def apply(layer: Layer, pair: Pair, scale: Tensor) -> None:
    """Multiplies columns, divides the feeder. scale: [columns], of the attention output shared within head groups."""
    for module in pair.modules:
        layer.tensors[f"{module}.weight"] = layer.weight(module) * scale
    rows = _per_kv_head(layer, scale)[:, 0].flatten() if pair.feeder == QKV[2] else scale
    name = f"{pair.feeder}.weight"
    tensor = layer.tensors[name]
    layer.tensors[name] = tensor / (rows if tensor.dim() == 1 else rows[:, None])
    if f"{pair.feeder}.bias" in layer.tensors:
        layer.tensors[f"{pair.feeder}.bias"] = layer.tensors[f"{pair.feeder}.bias"] / rows


def shared(layer: Layer, pair: Pair, values: Tensor) -> Tensor:
    """Values per column, those that must be alike made the largest of them. [columns]"""
    if pair.feeder != QKV[2]:
        return values
    heads = _per_kv_head(layer, values)
    return heads.amax(dim=1, keepdim=True).expand_as(heads).reshape(-1)


def safe(scale: Tensor) -> Tensor:
    """Factors in reason: positive, finite, within what half precision can divide and multiply."""
    return torch.nan_to_num(scale, nan=1.0, posinf=1.0).clamp(1e-4, 1e4)


def _per_kv_head(layer: Layer, values: Tensor) -> Tensor:
    """[columns] → [num_kv_heads, group, head_dim]."""
    spec = layer.spec
    return values.view(spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, spec.head_dim)
