"""Quantised matrices as `Linear`s: compiled kernels where there are any, else torch's operators on dequantised rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from replicas.engine.kernels.library import Kernels, Kind, Product
from replicas.engine.linear import Linear
from replicas.engine.quantization.matrix import Quantised, rounded_inputs
from replicas.engine.quantization.pack import can_pack, packed, unpacked

# Rows dequantised at once where there are no kernels: 1,024 rows of 4,096 columns are 16 MiB of float32.
_ROWS = 1024


class KernelLinear:
    """The compiled product. It computes in float32, whatever the activations' dtype."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self.num_rows = product.packed.rows

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return self.product(x)
        return self.product(x.float()).to(x.dtype)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.product.packed.tensors())


class DequantisingLinear:
    """Dequantises a thousand rows at a time, multiplies, forgets them. Any device; 4-bit codes lie two a byte."""

    def __init__(self, matrix: Quantised, bias: Tensor | None) -> None:
        self._halved = matrix.kind in (Kind.INTEGER4, Kind.TABLE4)
        self.num_rows, self._num_columns = matrix.rows, matrix.columns
        codes = matrix.codes
        if self._halved:
            codes = F.pad(codes, (0, codes.shape[1] % 2))
            codes = codes[:, 0::2] | codes[:, 1::2] << 4
        self._codes = codes.contiguous()
        self._matrix = _without_rows(matrix)
        self._scale, self._offset = matrix.scale, matrix.offset
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        inputs = rounded_inputs(x if x.device.type == "cuda" else x.float(), self._matrix)
        parts = []
        for start in range(0, self._codes.shape[0], _ROWS):
            weight = self.rows(slice(start, start + _ROWS)).dequantised()
            parts.append(F.linear(inputs, weight.to(inputs.dtype)))
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return (y if self._bias is None else y + self._bias).to(x.dtype)

    def rows(self, rows: slice | Tensor) -> Quantised:
        """Some rows, unpacked."""
        codes = self._codes.view(torch.uint8)[rows].view(self._codes.dtype)
        if self._halved:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, : self._num_columns]
        offset = None if self._offset is None else self._offset[rows]
        return replace(self._matrix, codes=codes, scale=self._scale[rows], offset=offset)

    @property
    def num_bytes(self) -> int:
        held = (self._codes, self._scale, self._offset, self._bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


class SplitLinear:
    """Products of the same input whose results lie behind one another: what cannot be one matrix."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = tuple(parts)

    @property
    def num_bytes(self) -> int:
        return sum(getattr(part, "num_bytes", 0) for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


@dataclass(frozen=True, slots=True)
class QuantisedLinears:
    """Makes `Linear`s of quantised matrices for one device. `kernels`: None where none could be built."""

    kernels: Kernels | None
    device: torch.device

    def linear(self, matrix: Quantised, bias: Tensor | None) -> KernelLinear | DequantisingLinear:
        """bias: [rows]"""
        if self.kernels is not None and self.device.type == "cpu" and can_pack(matrix):
            return KernelLinear(self.kernels.product(packed(matrix, bias)))
        return DequantisingLinear(_on(matrix, self.device), bias)


def rows_of(linear: KernelLinear | DequantisingLinear, rows: Tensor) -> Tensor:
    """Some rows of a linear's matrix, dequantised: [num_rows] → [num_rows, columns] float32. For embeddings."""
    if isinstance(linear, DequantisingLinear):
        return linear.rows(rows).dequantised()
    return unpacked(linear.product.packed, rows).dequantised()


def _without_rows(matrix: Quantised) -> Quantised:
    """All of a matrix that does not belong to rows."""
    offset = None if matrix.offset is None else matrix.offset[:0]
    codes = matrix.codes.new_empty(0, matrix.columns)
    return replace(matrix, codes=codes, scale=matrix.scale[:0], offset=offset)


def _on(matrix: Quantised, device: torch.device) -> Quantised:
    """A copy on a device, no part of which is still mapped from a file."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, copy=True)

    return replace(
        matrix,
        codes=matrix.codes.to(device, copy=True),
        scale=matrix.scale.to(device, copy=True),
        offset=moved(matrix.offset),
        table=moved(matrix.table),
        order=moved(matrix.order),
    )
