"""Quantisation on the fly: plain weights rounded to the nearest code, without looking at any text."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from replicas.engine.kernels.library import Kind, Offset
from replicas.engine.quantization.matrix import NF4, Quantised

NF4_BLOCK = 64
_E4M3_MAX = 448.0


def to_int8(weight: Tensor) -> Quantised:
    """Symmetric, a scale a row. weight: [rows, columns]"""
    weight = weight.float()
    scale = _positive(weight.abs().amax(dim=1, keepdim=True) / 127)
    codes = ((weight / scale).round() + 128).to(torch.uint8)
    return Quantised(Kind.INTEGER8, codes, scale, weight.shape[1])


def to_w8a8(weight: Tensor) -> Quantised:
    """As `to_int8`, and inputs rounded to int8 with one scale a token: faster on many tokens, less precise."""
    return replace(to_int8(weight), activation_bits=8)


def to_int4(weight: Tensor, group: int) -> Quantised:
    """Sixteen steps from the least to the largest weight of a group, zero among them; the zero point is a whole one.

    group: columns; -1 stands for a whole row.
    """
    weight, group = weight.float(), group_width(group, weight.shape[1])
    groups = grouped(weight, group)
    low, high = groups.amin(dim=2).clamp_max(0), groups.amax(dim=2).clamp_min(0)
    scale = _positive((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    codes = ((groups / scale.unsqueeze(2)).round() + zero.unsqueeze(2)).clamp(0, 15)
    return Quantised(Kind.INTEGER4, ungrouped(codes, weight), scale, group, Offset.ZERO, zero)


def to_nf4(weight: Tensor, block: int = NF4_BLOCK) -> Quantised:
    """The nearest of sixteen values that suit normally distributed weights, times a block's largest (Dettmers 2023)."""
    weight = weight.float()
    groups, table = grouped(weight, block), torch.tensor(NF4)
    scale = _positive(groups.abs().amax(dim=2))
    codes = torch.bucketize(groups / scale.unsqueeze(2), (table[1:] + table[:-1]) / 2)
    return Quantised(Kind.TABLE4, ungrouped(codes, weight), scale, min(block, weight.shape[1]), table=table)


def to_fp8(weight: Tensor) -> Quantised:
    """e4m3, a scale a row."""
    weight = weight.float()
    scale = _positive(weight.abs().amax(dim=1, keepdim=True) / _E4M3_MAX)
    return Quantised(Kind.E4M3, (weight / scale).to(torch.float8_e4m3fn), scale, weight.shape[1])


def group_width(group: int, columns: int) -> int:
    """How many columns share a scale: never more than there are, all of them for -1."""
    return columns if group == -1 else min(group, columns)


def grouped(weight: Tensor, group: int) -> Tensor:
    """[rows, columns] → [rows, groups, group]; the last group is filled up with its first column: no range changes."""
    group = group_width(group, weight.shape[1])
    missing = -weight.shape[1] % group
    if missing:
        start = weight.shape[1] // group * group
        weight = torch.cat([weight, weight[:, start : start + 1].expand(-1, missing)], dim=1)
    return weight.reshape(weight.shape[0], -1, group)


def ungrouped(codes: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `grouped` for codes of that weight. uint8"""
    return codes.flatten(1)[:, : weight.shape[1]].to(torch.uint8).contiguous()


def _positive(scale: Tensor) -> Tensor:
    """A row of zeros needs a scale too."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
