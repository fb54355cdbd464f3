"""Low-rank products by the compiled kernel: an adapter's matrices are read where they are, once for all its rows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from replicas.engine.kernels.library import Kernels
from replicas.engine.lora.layout import Part, TargetShape
from replicas.engine.lora.pool import PoolLayer, PoolPlan
from replicas.engine.lora.product import DenseSegment, LoraProduct, Segment, ShortProducts

_DENSE_ROWS, _DENSE_RANK = 32, 32
"""From these on, both, dense products are faster: a chunk's rows with a high rank."""

_MAX_PARTS = 3
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Step(ctypes.Structure):
    """`Step` of kernels/lora.cpp."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("row_ends", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("page_ends", ctypes.c_void_p),
        ("num_segments", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("num_parts", ctypes.c_int64),
        ("starts", ctypes.c_int64 * _MAX_PARTS),
        ("widths", ctypes.c_int64 * _MAX_PARTS),
        ("kind", ctypes.c_int32),
        ("matrix_kind", ctypes.c_int32),
        ("threads", ctypes.c_int64),
    )


class Compiled:
    """`ShortProducts` on the CPU: float32, bfloat16 or float16, for activations and pool alike or not."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
        self._function = kernels.lora
        self._kinds = (_KINDS[dtype], _KINDS[pool_dtype])

    def takes(self, segment: Segment) -> bool:
        return len(segment.rows) < _DENSE_ROWS or len(segment.pages) < _DENSE_RANK

    def make(self, segments: Sequence[Segment], shape: TargetShape) -> LoraProduct:
        return _CompiledProduct(self._function, segments, shape, self._kinds)


def agrees(short: ShortProducts, dtype: torch.dtype, pool_dtype: torch.dtype) -> bool:
    """Whether a way to multiply gives on this machine what dense products give: rows, ranks and widths of all kinds."""
    cpu = torch.device("cpu")
    shape = TargetShape(40, (Part("", slice(0, 24)), Part("", slice(24, 33))))
    layer = PoolLayer.zeros(shape, PoolPlan(1, 32, pool_dtype, cpu))
    for matrix in layer.matrices:
        matrix[1:] = _pattern(matrix[1:].shape, 7).to(pool_dtype)
    x = _pattern(torch.Size((16, 40)), 5).to(dtype)
    segments = [Segment([0, 3, 4, 5, 9], range(1, 10)), Segment([7], range(12, 29)), Segment([1, 2], [11])]
    found, expected = torch.ones(16, 33, dtype=dtype), torch.ones(16, 33, dtype=dtype)
    short.make(segments, shape)(found, x, layer)
    for segment in segments:
        DenseSegment(segment, shape, cpu)(expected, x, layer)
    tolerance = (1e-5 if dtype == torch.float32 else 0.03) * expected.abs().max().item()
    return torch.allclose(found.float(), expected.float(), atol=tolerance, rtol=0.0)


def _pattern(shape: torch.Size, period: int) -> Tensor:
    """Small numbers that every type holds exactly."""
    return (torch.arange(shape.numel()) % period - period // 2).float().view(shape)


class _CompiledProduct:
    def __init__(
        self,
        function: Callable[..., None],
        segments: Sequence[Segment],
        shape: TargetShape,
        kinds: tuple[int, int],
    ) -> None:
        numbers = (
            chain.from_iterable(s.rows for s in segments),
            accumulate(len(s.rows) for s in segments),
            chain.from_iterable(s.pages for s in segments),
            accumulate(len(s.pages) for s in segments),
        )
        self._held = [torch.tensor(list(each), dtype=torch.int32) for each in numbers]
        starts, widths = [part.columns.start for part in shape.parts], [part.num_columns for part in shape.parts]
        self._step = _Step(
            *(tensor.data_ptr() for tensor in self._held),
            len(segments),
            shape.in_features,
            len(shape.parts),
            (ctypes.c_int64 * _MAX_PARTS)(*starts),
            (ctypes.c_int64 * _MAX_PARTS)(*widths),
            *kinds,
            torch.get_num_threads(),
        )
        self._address = ctypes.addressof(self._step)
        self._function = function

    def __call__(self, y: Tensor, x: Tensor, layer: PoolLayer) -> None:
        addresses, _ = layer.addresses.buffer_info()
        self._function(self._address, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), addresses)
