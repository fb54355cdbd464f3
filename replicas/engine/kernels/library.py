"""The compiled kernels, called through ctypes: pointers in, nothing of torch on the other side."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor


class Kind(IntEnum):
    """How codes are stored: see matrix.h, whose numbers these are."""

    INTEGER4 = 0
    INTEGER8 = 1
    TABLE4 = 2
    E4M3 = 3
    E5M2 = 4


class Offset(IntEnum):
    """What is done beside scaling: `scale * (code - zero)`, `scale * code + minimum`. The numbers are matrix.h's."""

    NONE = 0
    ZERO = 1
    MINIMUM = 2


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("offset_kind", ctypes.c_int32),
        ("is_half", ctypes.c_int32),
        ("activation_bits", ctypes.c_int32),
        ("activation_scale", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix in the layout of matrix.h: blocks of 64 rows.

    codes: INTEGER4, TABLE4 [blocks, columns / 8, 64, 4] uint8; INTEGER8 [blocks, columns / 4, 64, 4], columns
    rounded up to 8; E4M3, E5M2 [blocks, columns, 64] uint8. scale, offset: [blocks, groups, 64], both float32 or both
    float16. `activation_bits`: 16, or 8 with one scale a token (`activation_scale` when that is fixed).
    """

    kind: Kind
    offset_kind: Offset
    rows: int
    columns: int
    group: int
    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None
    table: Tensor | None = None  # [16] float32
    order: Tensor | None = None  # [columns] int32
    bias: Tensor | None = None  # [rows] float32
    activation_bits: int = 16
    activation_scale: float = 0.0

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that lies in memory."""
        held = (self.codes, self.scale, self.offset, self.table, self.order, self.bias)
        return tuple(tensor for tensor in held if tensor is not None)


class Product:
    """y = x Wᵀ + b with a packed matrix, in float32."""

    def __init__(self, kernels: Kernels, packed: Packed) -> None:
        self.packed = packed
        assert all(tensor.is_contiguous() for tensor in packed.tensors())
        held = (packed.codes, packed.scale, packed.offset, packed.table, packed.order, packed.bias)
        self._matrix = _Matrix(
            *(_pointer(tensor) for tensor in held),
            packed.rows,
            packed.columns,
            packed.group,
            packed.kind,
            packed.offset_kind,
            packed.scale.dtype == torch.float16,
            packed.activation_bits,
            packed.activation_scale,
        )
        self._address = ctypes.addressof(self._matrix)
        self._function = kernels.linear

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, columns] float32 → [num_tokens, rows]."""
        x = x.contiguous()
        y = torch.empty(x.shape[0], self.packed.rows)
        self._function(self._address, x.data_ptr(), y.data_ptr(), x.shape[0], torch.get_num_threads())
        return y


class Stored(IntEnum):
    """How a KV cache keeps its values. The numbers are those of attention.cpp."""

    FLOAT32 = 0
    INT8 = 1
    E4M3 = 2
    E5M2 = 3


class CacheTable(ctypes.Structure):
    """Rows of a KV cache: `Cache` of attention.cpp."""

    _fields_ = (("values", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("stored", ctypes.c_int32))


class DecodeCall(ctypes.Structure):
    """What single tokens attend to: `Decode` of attention.cpp."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("num_seqs", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("query_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


HEAD_DIMS = (16, 32, 64, 80, 96, 128)
"""Sizes of heads that attention is compiled for, with vectors of 16 lanes as with those of 8."""


class Kernels:
    """The library of this machine. Raises OSError when it cannot be loaded.

    Tensors are float32, on the CPU, dense.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.linear = _function(library.warmgate_linear, (pointer, pointer, pointer, number, ctypes.c_int))
        self.decode = _function(library.warmgate_decode, (pointer, pointer, pointer, pointer))
        self.store_int8 = _function(library.warmgate_store_int8, (pointer, pointer, pointer, number, number))
        self.rms_norm = _function(
            library.warmgate_rms_norm, (pointer, pointer, pointer, number, number, ctypes.c_float)
        )
        self.gate = _function(library.warmgate_gate, (pointer, pointer, number, number))
        self.lora = _function(library.warmgate_lora, (pointer, pointer, number, pointer, number, pointer))

    def product(self, packed: Packed) -> Product:
        """A product that holds on to the matrix's tensors."""
        return Product(self, packed)


def cache_table(values: Tensor, scale: Tensor | None, stored: Stored) -> CacheTable:
    """values: [num_rows, head_dim], scale: [num_rows, 1] float16 of INT8. The tensors must outlive the table."""
    return CacheTable(values.data_ptr(), None if scale is None else scale.data_ptr(), stored)


def _function(function: Any, arguments: tuple[Any, ...]) -> Callable[..., None]:
    function.argtypes, function.restype = arguments, None
    return cast(Callable[..., None], function)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
