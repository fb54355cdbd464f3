"""How one layer's keys and values lie in memory: as computed, or in 8 bits.

A row is one head of one token. int8 rows have a scale each, the row's largest magnitude over 127; fp8 rows have none,
larger values than the format knows become its largest. Rows are rounded when written, and floats again when read.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from replicas.engine.kernels.library import Kernels, Stored, cache_table

KvDtype: TypeAlias = Literal["auto", "int8", "fp8", "fp8_e4m3", "fp8_e5m2"]

_FLOAT8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_SCALE = torch.float16
_LEAST_SCALE = 2.0**-24


class KvRows(Protocol):
    """One layer's rows; unwritten ones are zero."""

    def write(self, rows: Tensor, values: Tensor) -> None:
        """rows: [num_rows] int64, values: [num_rows, head_dim]"""
        ...

    def read(self, rows: Tensor) -> Tensor:
        """[num_rows] int64 → [num_rows, head_dim] in the engine's dtype."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that belongs to rows, a row in the first dimension."""
        ...


@dataclass(frozen=True, slots=True)
class PlainRows:
    """values: [num_rows, head_dim]"""

    values: Tensor

    def write(self, rows: Tensor, values: Tensor) -> None:
        self.values.index_copy_(0, rows, values)

    def read(self, rows: Tensor) -> Tensor:
        return self.values.index_select(0, rows)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """codes: [num_rows, head_dim] int8, scale: [num_rows, 1]"""

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype
    kernels: Kernels | None = None

    def write(self, rows: Tensor, values: Tensor) -> None:
        if self.kernels is not None:
            table, values = cache_table(self.codes, self.scale, Stored.INT8), values.contiguous()
            self.kernels.store_int8(ctypes.byref(table), rows.data_ptr(), values.data_ptr(), *values.shape)
            return
        scale = (values.abs().amax(dim=1, keepdim=True).float() / 127).to(_SCALE)
        codes = (values / scale.float().clamp_min(_LEAST_SCALE)).round().clamp(-127, 127)
        self.codes.index_copy_(0, rows, codes.to(torch.int8))
        self.scale.index_copy_(0, rows, scale)

    def read(self, rows: Tensor) -> Tensor:
        values = self.codes.index_select(0, rows).float() * self.scale.index_select(0, rows).float()
        return values.to(self.dtype)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale


@dataclass(frozen=True, slots=True)
class Float8Rows:
    """codes: [num_rows, head_dim] uint8, the bytes of `kind` (torch cannot index float8 everywhere)."""

    codes: Tensor
    kind: torch.dtype
    dtype: torch.dtype

    def write(self, rows: Tensor, values: Tensor) -> None:
        most = torch.finfo(self.kind).max
        self.codes.index_copy_(0, rows, values.clamp(-most, most).to(self.kind).view(torch.uint8))

    def read(self, rows: Tensor) -> Tensor:
        return self.codes.index_select(0, rows).view(self.kind).to(self.dtype)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.codes,)


@dataclass(frozen=True, slots=True)
class RowKind:
    """How rows are kept, and the engine's dtype. `kernels` round them to int8 where there are any."""

    stored: KvDtype
    dtype: torch.dtype
    device: torch.device
    kernels: Kernels | None = None


def make_rows(shape: tuple[int, int], kind: RowKind) -> KvRows:
    """Rows of zeros, [num_rows, head_dim] = `shape`; their pages stay untouched until written.

    Zeros, not empty: padding reads rows that nobody wrote, and 0 * NaN would not vanish.
    """
    if kind.stored == "auto":
        return PlainRows(torch.zeros(shape, dtype=kind.dtype, device=kind.device))
    if kind.stored == "int8":
        codes = torch.zeros(shape, dtype=torch.int8, device=kind.device)
        scale = torch.zeros(shape[0], 1, dtype=_SCALE, device=kind.device)
        compiled = kind.device.type == "cpu" and kind.dtype == torch.float32
        return Int8Rows(codes, scale, kind.dtype, kind.kernels if compiled else None)
    return Float8Rows(torch.zeros(shape, dtype=torch.uint8, device=kind.device), _FLOAT8[kind.stored], kind.dtype)


def row_bytes(head_dim: int, stored: KvDtype, dtype: torch.dtype) -> int:
    """Bytes of one row."""
    if stored == "auto":
        return head_dim * dtype.itemsize
    return head_dim + (_SCALE.itemsize if stored == "int8" else 0)
