"""The memory of all adapters that are loaded: pages of one rank each, in every layer.

A page is one row of A (for each part) and one column of B, through all products and layers. An adapter of rank r has r
pages, wherever they are; ranks that differ between its modules are filled up with zeros. So adapters of every rank
share one memory without gaps, as the pages of S-LoRA's unified pool do (Sheng et al. 2023).

    page    | qkv, layer 0: a row of A for q, k, v each, a column of B for each | qkv, layer 1 … | output … | down
    page 0  | zeros, for filling up
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from replicas.contract import EngineError
from replicas.engine.lora.layout import Shapes, Target, TargetShape

ZERO_PAGE = 0


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """How large a pool is, and where. `num_pages` counts the page of zeros."""

    num_layers: int
    num_pages: int
    dtype: torch.dtype
    device: torch.device


def page_bytes(shapes: Shapes, num_layers: int, dtype: torch.dtype) -> int:
    """Bytes of one rank of one adapter that adapts everything."""
    return num_layers * sum(shape.values_per_rank for shape in shapes.values()) * dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class PoolLayer:
    """One target of one layer, all pages. `a`: [num_pages, num_parts, in_features]; `b`: for each part [num_pages,
    num_columns], with the adapter's scaling in it. `addresses`: where these lie, in this order."""

    a: Tensor
    b: tuple[Tensor, ...]
    addresses: array[int]

    @classmethod
    def zeros(cls, shape: TargetShape, plan: PoolPlan) -> PoolLayer:
        """The pages of the operating system stay untouched until they are written."""

        def zeros(*size: int) -> Tensor:
            return torch.zeros(plan.num_pages, *size, dtype=plan.dtype, device=plan.device)

        a, b = zeros(len(shape.parts), shape.in_features), tuple(zeros(part.num_columns) for part in shape.parts)
        return cls(a, b, array("Q", [matrix.data_ptr() for matrix in (a, *b)]))

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        return (self.a, *self.b)


class LoraPool:
    """`layers[target]`: its memory, layer by layer.

    Pages are taken and given back from any thread; whoever has taken some may write them while steps use others.
    """

    def __init__(self, shapes: Shapes, plan: PoolPlan) -> None:
        self.shapes = shapes
        self.num_layers = plan.num_layers
        self.num_pages = plan.num_pages
        self.dtype = plan.dtype
        self.device = plan.device
        self.layers: dict[Target, list[PoolLayer]] = {
            target: [PoolLayer.zeros(shape, plan) for _ in range(plan.num_layers)] for target, shape in shapes.items()
        }
        self._free = list(range(1, plan.num_pages))  # sorted
        self._lock = threading.Lock()

    @property
    def num_ranks(self) -> int:
        """What the ranks of its adapters may sum to."""
        return self.num_pages - 1

    @property
    def num_bytes(self) -> int:
        return self.num_pages * page_bytes(self.shapes, self.num_layers, self.dtype)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, num_pages: int) -> tuple[int, ...]:
        """Pages for one adapter: neighbours where there are as many, which are read faster. Raises EngineError."""
        with self._lock:
            free = self._free
            if num_pages > len(free):
                raise EngineError(f"the pool has no room for rank {num_pages}: free={len(free)} of {self.num_ranks}")
            start = _run_of(free, num_pages)
            taken = tuple(free[start : start + num_pages])
            del free[start : start + num_pages]
            return taken

    def give_back(self, pages: Sequence[int]) -> None:
        """Pages that no step will use any more."""
        with self._lock:
            self._free = sorted([*self._free, *pages])

    def check(self, taken: Sequence[Sequence[int]]) -> None:
        """Asserts that every page is free or taken once; for tests."""
        pages = [*self._free, *(page for pages in taken for page in pages)]
        assert sorted(pages) == list(range(1, self.num_pages)), f"{len(pages)} of {self.num_ranks} pages"
        assert self._free == sorted(self._free)
        for layer in chain(*self.layers.values()):
            assert not any(matrix[ZERO_PAGE].any() for matrix in layer.matrices), "the page of zeros was written"


def _run_of(free: Sequence[int], length: int) -> int:
    """Where the shortest run of neighbours that is long enough begins; 0 when there is none."""
    best, best_length, start = 0, len(free) + 1, 0
    for i in range(1, len(free) + 1):
        if i == len(free) or free[i] != free[i - 1] + 1:
            if length <= i - start < best_length:
                best, best_length = start, i - start
            start = i
    return best
