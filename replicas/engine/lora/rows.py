"""Which rows of a step use which adapter, and the products that follow from it.

Rows of one adapter are brought together (the segments of Punica's SGMV, Chen et al. 2023): long segments, chunks of
prompts above all, have dense products of their own; all others share one that reads the pages of each row's adapter
(`product`). Worked out once a step, used in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from replicas.engine.lora.layout import Target
from replicas.engine.lora.pool import LoraPool
from replicas.engine.lora.product import DenseSegment, LoraProduct, Segment, ShortProducts


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [start, end) of the packed batch belong to one sequence; its adapter, or None."""

    adapter_id: str | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Placed:
    """An adapter in the pool. Of its `pages` a target uses the first `ranks[target]`."""

    pages: tuple[int, ...]
    ranks: Mapping[Target, int]


@dataclass(frozen=True, slots=True)
class LoraRows:
    """The low-rank part of one step: `products[target]` add to that target's output, in any order."""

    pool: LoraPool
    products: Mapping[Target, Sequence[LoraProduct]]

    def add(self, y: Tensor, x: Tensor, layer: int, target: Target) -> None:
        """y += s B A x for the rows that have adapters. x: [num_tokens, in], y: [num_tokens, out], changed in place."""
        for product in self.products[target]:
            product(y, x, self.pool.layers[target][layer])


@dataclass(frozen=True, slots=True)
class RowSorter:
    """Sorts batches' rows by adapter, for one pool."""

    pool: LoraPool
    short: ShortProducts

    def sort(self, spans: Sequence[Span], placed: Mapping[str, Placed]) -> LoraRows:
        """`placed`: the adapters that the spans name, at least one."""
        rows: dict[str, list[int]] = {adapter_id: [] for adapter_id in placed}
        for span in spans:
            if span.adapter_id is not None:
                rows[span.adapter_id].extend(range(span.start, span.end))
        products = {}
        for target in self.pool.shapes:
            used = ((rows[i], adapter.pages[: adapter.ranks[target]]) for i, adapter in placed.items())
            products[target] = self._products(target, [Segment(own, pages) for own, pages in used if pages])
        return LoraRows(self.pool, products)

    def _products(self, target: Target, segments: Sequence[Segment]) -> Sequence[LoraProduct]:
        shape = self.pool.shapes[target]
        short = [segment for segment in segments if self.short.takes(segment)]
        products: list[LoraProduct] = [self.short.make(short, shape)] if short else []
        return products + [DenseSegment(s, shape, self.pool.device) for s in segments if not self.short.takes(s)]
