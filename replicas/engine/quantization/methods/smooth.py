"""SmoothQuant (Xiao et al. 2022): outliers of activations are moved into weights, then both are rounded to int8."""

from __future__ import annotations

import torch

from replicas.engine.quantization.methods.scaling import PAIRS, apply, safe, shared
from replicas.engine.quantization.methods.statistics import Statistics
from replicas.engine.quantization.methods.textbook import Layer


def smooth(layer: Layer, statistics: Statistics, strength: float) -> None:
    """Scales a layer's columns by max|x|^strength / max|w|^(1 - strength). `statistics` are of its inputs as they were;
    a stage's outputs do not change, so one look serves all stages."""
    for pair in PAIRS:
        largest = shared(layer, pair, statistics.of(pair.modules[0]).largest).clamp_min(1e-5)
        weights = torch.stack([layer.weight(module).abs().amax(dim=0) for module in pair.modules]).amax(dim=0)
        scale = largest**strength / shared(layer, pair, weights).clamp_min(1e-5) ** (1 - strength)
        apply(layer, pair, safe(scale))
