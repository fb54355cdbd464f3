"""AWQ (Lin et al. 2023): columns that meet large activations are scaled up before rounding, so that they lose less.

s = mean|x|^a, a the best of twenty by |W X - Q(W s) X / s|²; then the range of each group is clipped, by the same loss.
Both losses need no more of X than Σ x xᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicas.engine.quantization.matrix import Quantised
from replicas.engine.quantization.methods.scaling import PAIRS, Pair, apply, safe, shared
from replicas.engine.quantization.methods.statistics import Statistics
from replicas.engine.quantization.methods.textbook import QKV, Layer
from replicas.engine.quantization.rounding import group_width, grouped, to_int4

_NUM_STRENGTHS = 20
_NUM_CLIPS = 10


def scale_layer(layer: Layer, statistics: Statistics, group: int) -> None:
    """Scales the columns of each pair by what loses least."""
    for pair in PAIRS:
        inputs = statistics.of(pair.modules[0])
        magnitude = shared(layer, pair, inputs.mean_magnitude).clamp_min(1e-6)
        candidates = [_normed(magnitude ** (i / _NUM_STRENGTHS)) for i in range(_NUM_STRENGTHS)]
        losses = [_loss(layer, pair, inputs.products, scale, group) for scale in candidates]
        apply(layer, pair, candidates[int(torch.stack(losses).argmin())])


def clipped(layer: Layer, module: str, products: Tensor, group: int) -> Tensor:
    """A module's weight with each group's range cut where that loses least. products: Σ x xᵀ of its input now.

    q and k are left alone, as in the paper: attention is too sensitive to them.
    """
    weight = layer.weight(module)
    group = group_width(group, weight.shape[1])
    if module in QKV[:2] or weight.shape[1] % group:
        return weight
    groups = grouped(weight, group)  # [rows, groups, group]
    inner = torch.stack([products[i : i + group, i : i + group] for i in range(0, len(products), group)])
    most = groups.abs().amax(dim=2, keepdim=True)
    best, found = torch.full(most.shape[:2], float("inf")), groups
    for i in range(_NUM_CLIPS):
        bound = most * (1 - 0.5 * i / _NUM_CLIPS)
        candidate = groups.clamp(-bound, bound)
        error = to_int4(candidate.flatten(1), group).dequantised().view_as(groups) - groups
        loss = (torch.einsum("rgi,gij->rgj", error, inner) * error).sum(dim=2)
        better = loss < best
        best, found = torch.where(better, loss, best), torch.where(better.unsqueeze(2), candidate, found)
    return found.flatten(1)


def quantise(weight: Tensor, group: int) -> Quantised:
    """[rows, columns] → 4 bits with zero points."""
    return to_int4(weight, group)


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
