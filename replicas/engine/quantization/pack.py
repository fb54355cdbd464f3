"""Quantised matrices in the layout of the compiled kernels (kernels/matrix.h)."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from replicas.engine.kernels.library import Kind, Packed
from replicas.engine.quantization.matrix import FLOAT8, Quantised

FLOAT8_TYPES = {kind: dtype for dtype, kind in FLOAT8.items()}
_ROWS = 64
_COLUMNS = 8


def can_pack(matrix: Quantised) -> bool:
    """Whether the kernels take it: groups must be cut at eight columns, unless there is but one."""
    return matrix.codes.device.type == "cpu" and (matrix.group % _COLUMNS == 0 or matrix.group >= matrix.columns)


def packed(matrix: Quantised, bias: Tensor | None) -> Packed:
    """The matrix, laid out. bias: [rows]"""
    # The kernels read e4m3 as half precision, whose exponent has another bias: 2^8 too small.
    scale = matrix.scale * 256 if matrix.kind is Kind.E4M3 else matrix.scale
    factors = (_blocked(scale), None if matrix.offset is None else _blocked(matrix.offset))
    if all(_fits_half(factor) for factor in factors if factor is not None):
        factors = (factors[0].half(), None if factors[1] is None else factors[1].half())
    return Packed(
        kind=matrix.kind,
        offset_kind=matrix.offset_kind,
        rows=matrix.rows,
        columns=matrix.columns,
        group=min(matrix.group, matrix.columns),
        codes=_CODES[matrix.kind](matrix.codes.view(torch.uint8)),
        scale=factors[0],
        offset=factors[1],
        table=None if matrix.table is None else matrix.table.clone(),  # it may be mapped from a file
        order=None if matrix.order is None else matrix.order.int(),
        bias=None if bias is None else bias.float().contiguous(),
        activation_bits=matrix.activation_bits,
        activation_scale=matrix.activation_scale,
    )


def unpacked(matrix: Packed, rows: Tensor) -> Quantised:
    """Some rows of what `packed` made. rows: [num_rows] int64"""
    blocks, lanes = rows // _ROWS, rows % _ROWS
    codes = matrix.codes[blocks, :, lanes]  # [num_rows, columns / 8 or 4, bytes], of floats [num_rows, columns]
    if matrix.kind is Kind.INTEGER4:
        codes = torch.stack([codes & 15, codes >> 4], dim=2)
    elif matrix.kind is Kind.TABLE4:
        codes = torch.stack([codes & 15, codes >> 4], dim=3)
    codes = codes.flatten(1)[:, : matrix.columns].contiguous()
    if matrix.kind in FLOAT8_TYPES:
        codes = codes.view(FLOAT8_TYPES[matrix.kind])
    scale = matrix.scale[blocks, :, lanes].float()
    return Quantised(
        kind=matrix.kind,
        codes=codes,
        scale=scale / 256 if matrix.kind is Kind.E4M3 else scale,
        group=matrix.group,
        offset_kind=matrix.offset_kind,
        offset=None if matrix.offset is None else matrix.offset[blocks, :, lanes].float(),
        table=matrix.table,
        order=None if matrix.order is None else matrix.order.long(),
        activation_bits=matrix.activation_bits,
        activation_scale=matrix.activation_scale,
    )


def _blocked(factors: Tensor) -> Tensor:
    """[rows, groups] → [blocks, groups, 64]; rows that pad the last block are zero."""
    padded = F.pad(factors, (0, 0, 0, -factors.shape[0] % _ROWS))
    return padded.view(-1, _ROWS, factors.shape[1]).transpose(1, 2).contiguous()


def _columns_by(codes: Tensor, *sizes: int) -> Tensor:
    """Rows to whole blocks, columns to whole eights; activations of padding columns are zero.

    [rows, columns] → [blocks, 64, -1, *sizes]
    """
    codes = F.pad(codes, (0, -codes.shape[1] % _COLUMNS, 0, -codes.shape[0] % _ROWS))
    return codes.view(-1, _ROWS, codes.shape[1] // prod(sizes), *sizes)


def _integer4(codes: Tensor) -> Tensor:
    """Byte b of an eight: column b in the low half, column 4 + b in the high one."""
    eights = _columns_by(codes, 2, 4)
    return (eights[..., 0, :] | eights[..., 1, :] << 4).transpose(1, 2).contiguous()


def _integer8(codes: Tensor) -> Tensor:
    return _columns_by(codes, 4).transpose(1, 2).contiguous()


def _table4(codes: Tensor) -> Tensor:
    """Column c of an eight in bits 4c: low half first in each byte."""
    pairs = _columns_by(codes, 4, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).transpose(1, 2).contiguous()


def _bytes(codes: Tensor) -> Tensor:
    codes = F.pad(codes, (0, 0, 0, -codes.shape[0] % _ROWS))
    return codes.view(-1, _ROWS, codes.shape[1]).transpose(1, 2).contiguous()


_CODES = {
    Kind.INTEGER4: _integer4,
    Kind.INTEGER8: _integer8,
    Kind.TABLE4: _table4,
    Kind.E4M3: _bytes,
    Kind.E5M2: _bytes,
}


def _fits_half(factors: Tensor) -> bool:
    return bool((factors.half().float() == factors).all())
