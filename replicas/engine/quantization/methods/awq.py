"""AWQ (Lin et al. 2023): columns that meet large activations are scaled up before rounding, so that they lose less.

s = mean|x|^a, a the best of twenty by |W X - Q(W s) X / s|², which needs no more of X than Σ x xᵀ. The paper then clips
each group's range and rounds; here columns are rounded as GPTQ does, which loses less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicas.engine.quantization.methods.scaling import PAIRS, Pair, apply, safe, shared
from replicas.engine.quantization.methods.statistics import Statistics
from replicas.engine.quantization.methods.textbook import Layer
from replicas.engine.quantization.rounding import to_int4

_NUM_STRENGTHS = 20


def scale_layer(layer: Layer, statistics: Statistics, group: int) -> None:
    """Scales the columns of each pair by what loses least."""
    for pair in PAIRS:
        inputs = statistics.of(pair.modules[0])
        magnitude = shared(layer, pair, inputs.mean_magnitude).clamp_min(1e-6)
        candidates = [_normed(magnitude ** (i / _NUM_STRENGTHS)) for i in range(_NUM_STRENGTHS)]
        losses = [_loss(layer, pair, inputs.products, scale, group) for scale in candidates]
        apply(layer, pair, candidates[int(torch.stack(losses).argmin())])


def _normed(scale: Tensor) -> Tensor:
    return safe(scale / (scale.amax() * scale.amin()).sqrt())


def _loss(layer: Layer, pair: Pair, products: Tensor, scale: Tensor, group: int) -> Tensor:
    """|W X - Q(W s) X / s|² over all modules of a pair."""
    total = torch.zeros(())
    for module in pair.modules:
        weight = layer.weight(module)
        error = to_int4(weight * scale, group).dequantised() / scale - weight
        total += ((error @ products) * error).sum()
    return total
