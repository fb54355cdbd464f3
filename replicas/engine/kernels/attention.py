"""Attention of single tokens by the compiled kernel: keys and values are read where they lie, in what they lie in."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from replicas.engine.attention import Context, KvGeometry
from replicas.engine.kernels.library import HEAD_DIMS, CacheTable, DecodeCall, Kernels, Stored, cache_table
from replicas.engine.kv_rows import Float8Rows, Int8Rows, KvRows, PlainRows

_FLOAT8 = {torch.float8_e4m3fn: Stored.E4M3, torch.float8_e5m2: Stored.E5M2}


def has_decode(geometry: KvGeometry) -> bool:
    """Whether the kernel takes this decoder's heads."""
    on_cpu = geometry.device.type == "cpu" and geometry.dtype == torch.float32
    return on_cpu and geometry.head_dim in HEAD_DIMS


class KernelDecode:
    """Implements `attention.Decode`."""

    def __init__(self, kernels: Kernels, geometry: KvGeometry, context: Context) -> None:
        self._held = (context.blocks.contiguous(), context.bias.contiguous())
        blocks, bias = self._held
        num_seqs, num_blocks = blocks.shape
        self._shape = (num_seqs, geometry.num_heads, geometry.head_dim)
        self._call = DecodeCall(
            blocks.data_ptr(),
            bias.data_ptr(),
            num_seqs,
            num_blocks,
            geometry.block_size,
            geometry.num_heads,
            geometry.num_kv_heads,
            geometry.head_dim,
            0,
            geometry.scale,
            torch.get_num_threads(),
        )
        self._function = kernels.decode

    def __call__(self, q: Tensor, cache: KvRows) -> Tensor:
        if q.stride()[1:] != (self._shape[2], 1):
            q = q.contiguous()
        self._call.query_stride = q.stride(0)
        out = torch.empty(self._shape)
        self._function(ctypes.byref(_table(cache)), ctypes.byref(self._call), q.data_ptr(), out.data_ptr())
        return out


def _table(rows: KvRows) -> CacheTable:
    if isinstance(rows, PlainRows):
        return cache_table(rows.values, None, Stored.FLOAT32)
    if isinstance(rows, Int8Rows):
        return cache_table(rows.codes, rows.scale, Stored.INT8)
    assert isinstance(rows, Float8Rows)
    return cache_table(rows.codes, None, _FLOAT8[rows.kind])
