"""y += B A x for rows with different adapters, read from the pool in place wherever the processor can.

    shrink  s[row, k] = A[page k of row's adapter] · x[row]         one value a page
    expand  y[row] += Σ_k s[row, k] B[page k of row's adapter]

A and B lie as the pool has them. A long segment has dense products of its own; the others come together in one pass:
gathering their matrices first, as bmm needs it, moves every weight three times instead of once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from replicas.engine.attention import has_sampled_product
from replicas.engine.linear import can_pack, product
from replicas.engine.lora.layout import TargetShape
from replicas.engine.lora.pool import ZERO_PAGE, PoolLayer

Index: TypeAlias = slice | Tensor
"""Rows or pages: a slice where they are neighbours, else int64 on the device."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of the batch that share an adapter, in rising order, and the adapter's pages: at least one of each."""

    rows: Sequence[int]
    pages: Sequence[int]


class LoraProduct(Protocol):
    """One step's product for one target: prepared once, called for every layer."""

    def __call__(self, y: Tensor, x: Tensor, layer: PoolLayer) -> None:
        """x: [num_tokens, in], y: [num_tokens, out] changed in place; their rows are dense."""
        ...


class ShortProducts(Protocol):
    """How segments are multiplied that are not worth dense products, on one device and type."""

    def takes(self, segment: Segment) -> bool:
        """Whether this is faster than `DenseSegment`."""
        ...

    def make(self, segments: Sequence[Segment], shape: TargetShape) -> LoraProduct:
        """One product for all of them: at least one."""
        ...


class DenseSegment:
    """Rows that share an adapter: two dense products."""

    def __init__(self, segment: Segment, shape: TargetShape, device: torch.device) -> None:
        self._rows = _index(segment.rows, device)
        self._pages = _index(segment.pages, device)
        self._columns = [part.columns for part in shape.parts]

    def __call__(self, y: Tensor, x: Tensor, layer: PoolLayer) -> None:
        rows, x = self._rows, x[self._rows]
        weight = layer.a[self._pages].to(x.dtype)  # [rank, num_parts, in]
        shrunk = _product(x, weight.flatten(0, 1)).view(-1, *weight.shape[:2])  # [num_rows, rank, num_parts]
        for i, columns in enumerate(self._columns):
            expand = layer.b[i][self._pages].to(x.dtype)  # [rank, num_columns]
            if isinstance(rows, slice):
                y[rows, columns].addmm_(shrunk[:, :, i], expand)
            else:
                y[:, columns].index_add_(0, rows, shrunk[:, :, i] @ expand)


class InPlace:
    """Reads pages where they are: shrink as a sampled dense-dense product, expand as an embedding bag. CPU, float32.

    torch has no other kernels that read rows through an index (see `attention.SparseDecode`).
    """

    def takes(self, segment: Segment) -> bool:
        return len(segment.rows) < _DENSE_ROWS

    def make(self, segments: Sequence[Segment], shape: TargetShape) -> LoraProduct:
        return _InPlaceProduct(segments, shape)


class _InPlaceProduct:
    def __init__(self, segments: Sequence[Segment], shape: TargetShape) -> None:
        by_row = sorted((row, segment.pages) for segment in segments for row in segment.rows)
        num_parts, first, last = len(shape.parts), by_row[0][0], by_row[-1][0]
        lengths = torch.zeros(last + 1 - first, dtype=torch.int32)  # rows between without an adapter: empty
        lengths[torch.tensor([row for row, _ in by_row]) - first] = torch.tensor(
            [len(pages) for _, pages in by_row], dtype=torch.int32
        )
        starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        self._rows = slice(first, last + 1)
        self._columns = [part.columns for part in shape.parts]
        self._pages = torch.tensor([page for _, pages in by_row for page in pages], dtype=torch.int32)
        self._bags = starts[:-1]
        samples = (self._pages[:, None] * num_parts + torch.arange(num_parts, dtype=torch.int32)).flatten()
        self._pattern = (starts * num_parts, samples, torch.zeros(samples.shape))
        self._sparse: Tensor | None = None

    def __call__(self, y: Tensor, x: Tensor, layer: PoolLayer) -> None:
        y, x = y[self._rows], x[self._rows]
        a = layer.a.flatten(0, 1)  # [num_pages * num_parts, in]
        if self._sparse is None:  # its shape needs the pool's
            size = (x.shape[0], a.shape[0])
            self._sparse = torch.sparse_csr_tensor(*self._pattern, size, check_invariants=False)
        shrunk = torch.sparse.sampled_addmm(self._sparse, x, a.t(), beta=0.0).values()
        weights = shrunk.view(-1, len(self._columns)).t().contiguous()  # [num_parts, pages of all rows]
        for columns, b, factors in zip(self._columns, layer.b, weights, strict=True):
            y[:, columns] += F.embedding_bag(self._pages, b, self._bags, mode="sum", per_sample_weights=factors)


class Gathered:
    """Gathers each row's matrices, then batched products of equal rank: any device, any type.

    Ranks are rounded up to powers of two and filled with the page of zeros, so that few products serve mixed ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def takes(self, segment: Segment) -> bool:
        return len(segment.rows) < _DENSE_ROWS

    def make(self, segments: Sequence[Segment], shape: TargetShape) -> LoraProduct:
        return _GatheredProduct(segments, shape, self._device)


class _GatheredProduct:
    def __init__(self, segments: Sequence[Segment], shape: TargetShape, device: torch.device) -> None:
        by_size: dict[int, list[tuple[int, list[int]]]] = {}
        for segment in segments:
            size = 1 << (len(segment.pages) - 1).bit_length()
            filled = [*segment.pages, *[ZERO_PAGE] * (size - len(segment.pages))]
            by_size.setdefault(size, []).extend((row, filled) for row in segment.rows)
        self._columns = [part.columns for part in shape.parts]
        buckets = [tuple(zip(*bucket, strict=True)) for bucket in by_size.values()]
        self._buckets = [  # rows; pages of each, [num_rows, size]
            (torch.tensor(rows, device=device), torch.tensor(pages, device=device)) for rows, pages in buckets
        ]

    def __call__(self, y: Tensor, x: Tensor, layer: PoolLayer) -> None:
        for rows, pages in self._buckets:
            own = x[rows].unsqueeze(2)  # [num_rows, in, 1]
            weight = layer.a[pages].to(x.dtype)  # [num_rows, size, num_parts, in]
            shrunk = torch.bmm(weight.flatten(1, 2), own).view(*weight.shape[:3])
            for i, columns in enumerate(self._columns):
                expanded = torch.bmm(shrunk[:, :, i].unsqueeze(1), layer.b[i][pages].to(x.dtype)).squeeze(1)
                y[:, columns].index_add_(0, rows, expanded)


_DENSE_ROWS = 16


def pick_short(dtype: torch.dtype, pool_dtype: torch.dtype, device: torch.device) -> ShortProducts:
    """The fastest way that torch has for this device and these types."""
    if device.type == "cpu" and dtype == pool_dtype == torch.float32 and has_sampled_product():
        return InPlace()
    return Gathered(device)


def _index(numbers: Sequence[int], device: torch.device) -> Index:
    first, last = numbers[0], numbers[-1]
    if list(numbers) == list(range(first, last + 1)):
        return slice(first, last + 1)
    return torch.tensor(numbers, device=device)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ: oneDNN is twice as fast on the CPU where it has the type."""
    return product(x, weight) if can_pack(weight) else x @ weight.t()
