"""GPTQ (Frantar et al. 2022): columns are rounded one by one, and each one's error is made good by those that follow.

The loss is |W X - Q X|² over calibration inputs X, whose second derivative H = 2 X Xᵀ is the same for all rows. With
`order` columns with large H come first, while most others are free to compensate; groups are cut in that order too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from replicas.engine.kernels.library import Kind, Offset
from replicas.engine.quantization.matrix import Quantised
from replicas.engine.quantization.rounding import group_width

_BLOCK = 128
_MAX_CODE = 15


@dataclass(frozen=True, slots=True)
class GptqSettings:
    """`damping`: share of H's mean diagonal that is added to it. `by_importance`: columns in H's order (`desc_act`)."""

    group: int
    by_importance: bool = False
    damping: float = 0.01


def quantise(weight: Tensor, products: Tensor, settings: GptqSettings) -> Quantised:
    """4 bits with zero points. weight: [rows, columns], products: Σ x xᵀ over inputs, [columns, columns]."""
    weight, hessian = weight.clone(), products.double()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    weight[:, unused] = 0
    order = torch.argsort(hessian.diagonal(), descending=True) if settings.by_importance else None
    if order is not None:
        weight, hessian = weight[:, order], hessian[order][:, order]
    rounding = _Rounding.of(weight, settings.group)
    _round_columns(weight, _inverse_root(hessian, settings.damping), rounding)
    return Quantised(
        kind=Kind.INTEGER4,
        codes=rounding.codes,
        scale=rounding.scale,
        group=rounding.group,
        offset_kind=Offset.ZERO,
        offset=rounding.zero,
        order=order,
    )


@dataclass(frozen=True, slots=True)
class _Rounding:
    """Codes so far, and the grid of each group. scale, zero: [rows, groups]"""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: int

    @classmethod
    def of(cls, weight: Tensor, group: int) -> _Rounding:
        rows, columns = weight.shape
        group = group_width(group, columns)
        factors = torch.ones(rows, -(-columns // group))
        return cls(torch.zeros(rows, columns, dtype=torch.uint8), factors, factors.clone(), group)

    def start_group(self, index: int, weight: Tensor) -> None:
        """Fits a group's grid to its weights as they are now, [rows, group]."""
        self.scale[:, index], self.zero[:, index] = fitted_grid(weight)

    def round(self, column: int, values: Tensor) -> Tensor:
        """Takes the nearest codes of a column; returns what they stand for. values: [rows]"""
        scale, zero = self.scale[:, column // self.group], self.zero[:, column // self.group]
        codes = (values / scale + zero).round().clamp(0, _MAX_CODE)
        self.codes[:, column] = codes.to(torch.uint8)
        return (codes - zero) * scale


def fitted_grid(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of rows, of the ranges from the full one down to 0.6 of it those with the least error.

    Zero points are 1 to 15: zero itself cannot be said in the first layout of GPTQ checkpoints. [rows, n] → [rows] each
    """
    low, high = weight.amin(dim=1).clamp_max(0), weight.amax(dim=1).clamp_min(0)
    best = torch.full_like(low, float("inf"))
    found = (torch.ones_like(low), torch.full_like(low, 8.0))
    for shrink in torch.linspace(1.0, 0.6, 33).tolist():
        scale = ((high - low) * shrink / _MAX_CODE).half().float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = (-low * shrink / scale).round().clamp(1, _MAX_CODE)
        codes = (weight / scale[:, None] + zero[:, None]).round().clamp(0, _MAX_CODE)
        error = ((codes - zero[:, None]) * scale[:, None] - weight).abs().pow(2.4).sum(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        found = (torch.where(better, scale, found[0]), torch.where(better, zero, found[1]))
    return found


def _inverse_root(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of H⁻¹, float32. Damps more when H is not positive enough."""
    size = hessian.diagonal().mean()
    for attempt in range(6):
        damped = hessian + torch.eye(len(hessian), dtype=hessian.dtype) * size * damping * 10**attempt
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            root: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
            return root
    raise ArithmeticError("the calibration inputs give no positive second derivative")


def _round_columns(weight: Tensor, root: Tensor, rounding: _Rounding) -> None:
    """Rounds column after column, errors pushed on within a block at once and beyond it in one product."""
    columns = weight.shape[1]
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.zeros(weight.shape[0], end - start)
        for column in range(start, end):
            if column % rounding.group == 0:
                group = weight[:, column : column + rounding.group].clone()
                # Columns of the group beyond this block have not had the block's errors yet.
                beyond = max(0, column + group.shape[1] - end)
                if beyond:
                    group[:, -beyond:] -= errors @ root[start:end, end : end + beyond]
                rounding.start_group(column // rounding.group, group)
            values = weight[:, column]
            error = (values - rounding.round(column, values)) / root[column, column]
            weight[:, column:end] -= error[:, None] * root[column, column:end]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ root[start:end, end:]
