"""Codes and scales made better together, once each has been chosen for itself.

GPTQ rounds every column once, knowing only those before it. Cyclic coordinate descent (QuantEase, Behdin et al. 2023)
looks at each again, with all others as they are now; and given the codes, the scales that lose least are a small
least-squares problem a row. Neither can make |W X - Q X|² larger, but for the rounding of scales to half precision.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from replicas.engine.quantization.matrix import Quantised

NUM_SWEEPS = 3
_BLOCK = 128
_MAX_CODE = 15
_RIDGE = 1e-4


def refined(matrix: Quantised, weight: Tensor, products: Tensor, damping: float) -> Quantised:
    """Four bits with zero points, better ones. weight: [rows, columns] as it was, products: Σ x xᵀ over inputs."""
    assert matrix.offset is not None
    hessian = products.float().clone()
    hessian.diagonal()[hessian.diagonal() == 0] = 1  # no input has these columns
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    if matrix.order is not None:
        weight, hessian = weight[:, matrix.order], hessian[matrix.order][:, matrix.order]
    codes, zero, scale = matrix.codes.float(), matrix.offset.float(), matrix.scale.float()
    for _ in range(NUM_SWEEPS):
        scale = _fitted_scales(codes - _wide(zero, codes, matrix.group), scale, weight, hessian)
        _sweep(codes, _wide(scale, codes, matrix.group), _wide(zero, codes, matrix.group), weight, hessian)
    return replace(matrix, codes=codes.to(torch.uint8), scale=scale)


def _wide(factors: Tensor, codes: Tensor, group: int) -> Tensor:
    """[rows, groups] → [rows, columns]"""
    return factors.repeat_interleave(group, dim=1)[:, : codes.shape[1]]


def _fitted_scales(steps: Tensor, scale: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    """The scales that lose least with these codes, one system of equations a row; those that would turn a group's sign
    stay. steps: codes without zero points, [rows, columns] → [rows, groups]"""
    rows, num_groups = scale.shape
    group = -(-steps.shape[1] // num_groups)
    spans = [slice(g * group, (g + 1) * group) for g in range(num_groups)]
    wanted = (weight @ hessian) * steps
    right = torch.stack([wanted[:, span].sum(1) for span in spans], dim=1)
    left = torch.empty(rows, num_groups, num_groups)
    for g, span in enumerate(spans):
        seen = (steps[:, span] @ hessian[span]) * steps
        left[:, g] = torch.stack([seen[:, other].sum(1) for other in spans], dim=1)
    # A group without a step says nothing about its scale: the ridge keeps what it had.
    ridge = _RIDGE * left.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True).clamp_min(1e-12)
    left.diagonal(dim1=1, dim2=2).add_(ridge)
    found = torch.linalg.solve(left, right + ridge * scale).half().float()
    return torch.where((found > 0) & torch.isfinite(found), found, scale)


def _sweep(codes: Tensor, scale: Tensor, zero: Tensor, weight: Tensor, hessian: Tensor) -> None:
    """Every column once more, the others as they are. codes, scale, zero, weight: [rows, columns]; changes codes."""
    slope = (weight - (codes - zero) * scale) @ hessian  # half the derivative, its sign turned
    columns = codes.shape[1]
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        inner, local = hessian[start:end, start:end], slope[:, start:end].clone()
        changes = torch.zeros_like(local)
        for i, column in enumerate(range(start, end)):
            steps = codes[:, column] + local[:, i] / (inner[i, i] * scale[:, column])
            better = steps.round().clamp(0, _MAX_CODE)
            change = (better - codes[:, column]) * scale[:, column]
            codes[:, column] = better
            changes[:, i] = change
            local -= change[:, None] * inner[i]
        slope -= changes @ hessian[start:end]
