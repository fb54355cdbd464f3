"""Rotary positions as complex numbers: turning a pair of values by an angle is one multiplication.

The table is a function of the position alone. Where transformers' dynamic NTK changes all frequencies with the length
of the call, position p here always turns as in a context of p + 1 tokens, which is what token-by-token decoding does:
only so can a cached block be used by whoever shares its prefix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from replicas.engine.families import RopeSpec


def rope_table(spec: RopeSpec, head_dim: int, max_len: int) -> Tensor:
    """cos + i sin of every position, times the attention factor. [max_len, head_dim // 2] complex64."""
    positions = torch.arange(max_len, dtype=torch.float32)
    if spec.kind == "dynamic":
        angles = positions[:, None] * _dynamic_frequencies(spec, head_dim, max_len)
    else:
        angles = positions[:, None] * inverse_frequencies(spec, head_dim)
    return torch.polar(torch.full_like(angles, attention_factor(spec)), angles)


def rotate(heads: Tensor, turns: Tensor) -> None:
    """Turns pairs of neighbouring values in place.

    heads: [num_tokens, num_heads, head_dim], the last dimension contiguous;
    turns: [num_tokens, 1, head_dim // 2] complex64.
    """
    pairs = heads.view(*heads.shape[:-1], -1, 2)
    if heads.dtype == torch.float32:
        torch.view_as_complex(pairs).mul_(turns)
    else:
        wide = torch.view_as_complex(pairs.float())
        pairs.copy_(torch.view_as_real(wide.mul_(turns)))


def pair_order(head_dim: int) -> Tensor:
    """Where each value of a rotated head comes from: checkpoints pair value i with i + head_dim // 2, `rotate` pairs
    neighbours. Attention does not see a reordering that queries and keys share. [head_dim]"""
    return torch.arange(head_dim).view(2, head_dim // 2).t().reshape(-1)


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> Tensor:
    """Radians per position of each pair. [head_dim // 2] float32."""
    plain = 1.0 / (spec.theta ** _exponents(head_dim))
    if spec.kind == "linear":
        return plain / spec.factor
    if spec.kind == "llama3":
        return _llama3(spec, plain)
    if spec.kind == "yarn":
        return _yarn(spec, head_dim)
    return plain


def attention_factor(spec: RopeSpec) -> float:
    """What YaRN multiplies queries and keys with to keep attention sharp over long contexts; 1 for all others."""
    if spec.kind != "yarn":
        return 1.0
    if spec.attention_factor is not None:
        return float(spec.attention_factor)
    if spec.mscale and spec.mscale_all_dim:
        return _mscale(spec.factor, spec.mscale) / _mscale(spec.factor, spec.mscale_all_dim)
    return _mscale(spec.factor, 1.0)


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _dynamic_frequencies(spec: RopeSpec, head_dim: int, max_len: int) -> Tensor:
    """NTK-aware scaling that sets in beyond the trained length. [max_len, head_dim // 2]"""
    lengths = torch.arange(1, max_len + 1, dtype=torch.float32).clamp_min(spec.original_max_len)
    stretch = spec.factor * lengths / spec.original_max_len - (spec.factor - 1)
    bases = spec.theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / (bases[:, None] ** _exponents(head_dim))


def _llama3(spec: RopeSpec, plain: Tensor) -> Tensor:
    """Llama 3.1: slow waves are stretched, fast ones kept, those between interpolated."""
    waves = 2 * math.pi / plain
    slow = spec.original_max_len / spec.low_freq_factor
    fast = spec.original_max_len / spec.high_freq_factor
    span = spec.high_freq_factor - spec.low_freq_factor
    smooth = (spec.original_max_len / waves - spec.low_freq_factor) / span
    between = (1 - smooth) * plain / spec.factor + smooth * plain
    return torch.where(waves > slow, plain / spec.factor, torch.where(waves < fast, plain, between))


def _yarn(spec: RopeSpec, head_dim: int) -> Tensor:
    """YaRN (Peng et al. 2023): interpolate the dimensions that turn less than `beta_slow` times in the trained length,
    keep those that turn more than `beta_fast` times, ramp between."""

    def dimension(rotations: float) -> float:
        ratio = spec.original_max_len / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp needs a width
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    plain = spec.theta ** _exponents(head_dim)
    return ramp / (spec.factor * plain) + (1 - ramp) / plain
