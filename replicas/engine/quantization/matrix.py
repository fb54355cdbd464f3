"""One value for a weight matrix however it is quantised: a code per weight, a scale per group of a row's columns.

    weight[row, column] = scale[row, column // group] * (value(code) - zero)       Offset.ZERO
                                                      * value(code) + minimum      Offset.MINIMUM

Readers of checkpoints and methods on the fly make these; `linears` turns them into products. `dequantised` is the slow
obvious meaning that everything else must equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from replicas.engine.kernels.library import Kind, Offset

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""QLoRA's 4-bit NormalFloat (Dettmers et al. 2023, appendix E)."""

FP4 = (
    0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
    0.0, -0.005208333333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25,
)  # fmt: skip
"""bitsandbytes' 4-bit float, in its order of codes."""

FLOAT8 = {torch.float8_e4m3fn: Kind.E4M3, torch.float8_e5m2: Kind.E5M2}
INTEGER_ZERO = {Kind.INTEGER4: 8, Kind.INTEGER8: 128}
"""What integer codes of a matrix without offsets are counted from."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """A quantised matrix, unpacked: a byte a code.

    codes: [rows, columns] uint8, of E4M3 and E5M2 float8; scale, offset: [rows, groups] float32; table: [16] float32
    for TABLE4; order: [columns], the input that each column multiplies, when columns were sorted into groups.
    `activation_bits` 8: inputs are rounded to int8 too, with `activation_scale`, or with each token's own if it is 0.
    """

    kind: Kind
    codes: Tensor
    scale: Tensor
    group: int
    offset_kind: Offset = Offset.NONE
    offset: Tensor | None = None
    table: Tensor | None = None
    order: Tensor | None = None
    activation_bits: int = 16
    activation_scale: float = 0.0

    def __post_init__(self) -> None:
        groups = -(-self.columns // self.group)
        assert self.scale.shape == (self.rows, groups), f"{self.scale.shape=} {self.codes.shape=} {self.group=}"
        assert (self.offset is None) == (self.offset_kind is Offset.NONE)
        assert self.offset is None or self.offset.shape == self.scale.shape

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        return self.codes.shape[1]

    def values(self) -> Tensor:
        """What the codes stand for before scaling. [rows, columns] float32"""
        if self.kind in INTEGER_ZERO:
            centre = INTEGER_ZERO[self.kind] if self.offset_kind is Offset.NONE else 0
            return self.codes.float() - centre
        if self.table is not None:
            return self.table[self.codes.int()]
        return self.codes.float()

    def dequantised(self) -> Tensor:
        """The matrix as float32, its columns in the inputs' order. [rows, columns]"""
        weight = self.values()
        scale = self._spread(self.scale)
        if self.offset is not None and self.offset_kind is Offset.ZERO:
            weight = weight - self._spread(self.offset)
        weight = weight * scale
        if self.offset is not None and self.offset_kind is Offset.MINIMUM:
            weight = weight + self._spread(self.offset)
        if self.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.order, weight)

    def take(self, rows: Tensor) -> Quantised:
        """Some rows, in that order. rows: [num_rows] int64"""
        # float8 tensors have no indexing on CPU; their bytes have.
        codes = self.codes.view(torch.uint8)[rows].view(self.codes.dtype)
        offset = None if self.offset is None else self.offset[rows]
        return replace(self, codes=codes, scale=self.scale[rows], offset=offset)

    def _spread(self, factors: Tensor) -> Tensor:
        """A value per group → one per column."""
        return factors.repeat_interleave(self.group, dim=1)[:, : self.columns]


def rounded_inputs(x: Tensor, matrix: Quantised) -> Tensor:
    """Inputs as a matrix takes them: as they are, or rounded to int8 with one scale a token, or a fixed one for all."""
    if matrix.activation_bits == 16:
        return x
    step = x.float().abs().amax(dim=-1, keepdim=True) / 127
    if matrix.activation_scale:
        step = torch.full_like(step, matrix.activation_scale)
    codes = (x.float() / step.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-128, 127)
    return (codes * step).to(x.dtype)


def stacked(parts: Sequence[Quantised]) -> Quantised | None:
    """Matrices with the same inputs as one, rows behind one another; None when they are not quantised alike."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(_form(part) != _form(first) or not _same(part.order, first.order) for part in parts):
        return None
    offsets = [part.offset for part in parts if part.offset is not None]
    codes = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(first.codes.dtype)
    return replace(
        first,
        codes=codes,
        scale=torch.cat([part.scale for part in parts]),
        offset=torch.cat(offsets) if offsets else None,
    )


def _form(matrix: Quantised) -> tuple[object, ...]:
    """All that matrices must share to be stacked."""
    table = None if matrix.table is None else tuple(matrix.table.tolist())
    activations = (matrix.activation_bits, matrix.activation_scale)
    return (matrix.kind, matrix.codes.dtype, matrix.columns, matrix.group, matrix.offset_kind, table, *activations)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
