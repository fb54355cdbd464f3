"""Turns a plan into tensors. Rows of the packed batch: single tokens first, by context length, then chunks.

rows   | decode, longest … shortest | chunk of a | chunk of b |
         └ groups of similar length ┘
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from replicas.engine.attention import Context, Decode, DecodeKernel, KvGeometry
from replicas.engine.prefill import Chunk, ChunkAttention, ChunkKernel, visibility_bias
from replicas.engine.sequence import Plan, PlanItem

Ints = npt.NDArray[np.int64]

# A group more costs about as much time in a layer as this many padded keys (one CPU core, 3 KV heads of 64).
_GROUP_COST_KEYS = 256


@dataclass(frozen=True, slots=True)
class AttentionView:
    """A step's attention for layers with the same window: rows of the packed batch, and who attends for them.

    `writes`: cache rows of every k and v head of every token, [num_tokens * 2 num_kv_heads].
    """

    geometry: KvGeometry
    writes: Tensor
    decodes: tuple[tuple[slice, Decode], ...]
    chunks: tuple[tuple[slice, ChunkAttention], ...]

    def __call__(self, qkv: Tensor, cache: Tensor) -> Tensor:
        """Writes k and v into the layer's cache, then attends. → [num_tokens, num_heads * head_dim]."""
        num_heads = self.geometry.num_heads
        cache.index_copy_(0, self.writes, qkv[:, num_heads:].reshape(-1, self.geometry.head_dim))
        parts = [decode(qkv[rows, :num_heads], cache) for rows, decode in self.decodes]
        parts += [chunk(qkv[rows], cache) for rows, chunk in self.chunks]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.flatten(1)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's input. `last_rows[i]` is the row of plan item i's last token; `first_rows[i]` of its first.

    `views[window]`: attention of the layers with that window.
    """

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    first_rows: tuple[int, ...]
    last_rows: tuple[int, ...]
    views: Mapping[int | None, AttentionView]


@dataclass(frozen=True, slots=True)
class Batcher:
    """Builds `StepBatch`es for one cache. `windows` are the different ones among the layers."""

    geometry: KvGeometry
    decode: DecodeKernel
    chunk: ChunkKernel
    windows: frozenset[int | None]

    def build(self, plan: Plan) -> StepBatch:
        """The tensors of a plan that has items."""
        order = sorted(range(len(plan.items)), key=lambda i: _row_order(plan.items[i]))
        items = [plan.items[i] for i in order]
        ends = np.cumsum([item.num_tokens for item in items])
        first, last = [0] * len(items), [0] * len(items)
        for i, item, end in zip(order, items, ends.tolist(), strict=True):
            first[i], last[i] = end - item.num_tokens, end - 1
        tokens = chain.from_iterable(item.seq.tokens[item.start : item.start + item.num_tokens] for item in items)
        positions = np.concatenate([np.arange(item.start, item.start + item.num_tokens) for item in items])
        writes = self._writes(items, positions)
        num_decodes = sum(item.num_tokens == 1 for item in items)
        return StepBatch(
            token_ids=torch.tensor(list(tokens), dtype=torch.int64).to(self.geometry.device),
            positions=self._put(positions),
            first_rows=tuple(first),
            last_rows=tuple(last),
            views={
                window: AttentionView(
                    self.geometry,
                    writes,
                    tuple(self._decodes(items[:num_decodes], window)),
                    tuple(self._chunks(items[num_decodes:], window, num_decodes)),
                )
                for window in self.windows
            },
        )

    def _writes(self, items: Sequence[PlanItem], positions: Ints) -> Tensor:
        size, num_heads = self.geometry.block_size, 2 * self.geometry.num_kv_heads
        blocks = np.concatenate(
            [
                np.array(item.seq.block_ids[item.start // size : (item.start + item.num_tokens - 1) // size + 1])[
                    np.arange(item.start, item.start + item.num_tokens) // size - item.start // size
                ]
                for item in items
            ]
        )
        rows = (blocks[:, None] * num_heads + np.arange(num_heads)) * size + (positions % size)[:, None]
        return self._put(rows.reshape(-1))

    def _decodes(self, items: Sequence[PlanItem], window: int | None) -> Iterator[tuple[slice, Decode]]:
        """Groups of single tokens, padded to the longest context of the group."""
        size = self.geometry.block_size
        spans = [_blocks_seen(item.start, item.start + 1, window, size) for item in items]
        start = 0
        for end in _group_ends([len(span) * size for span in spans]):
            tables = np.zeros((end - start, max(map(len, spans[start:end]))), dtype=np.int64)
            for row, item, span in zip(tables, items[start:end], spans[start:end], strict=True):
                row[: len(span)] = item.seq.block_ids[span.start : span.stop]
            queries = self._put(np.array([item.start for item in items[start:end]]))
            keys_from = self._put(np.array([span.start * size for span in spans[start:end]]))
            keys = keys_from[:, None] + torch.arange(tables.shape[1] * size, device=self.geometry.device)
            context = Context(self._put(tables), visibility_bias(queries[:, None], keys, window))
            yield slice(start, end), self.decode(self.geometry, context)
            start = end

    def _chunks(
        self, items: Sequence[PlanItem], window: int | None, row: int
    ) -> Iterator[tuple[slice, ChunkAttention]]:
        for item in items:
            rows = slice(row, row + item.num_tokens)
            row = rows.stop
            yield rows, self.chunk(self.geometry, self._chunk(item, window))

    def _chunk(self, item: PlanItem, window: int | None) -> Chunk:
        size, end = self.geometry.block_size, item.start + item.num_tokens
        queries = range(item.start, end)
        if item.start == 0:
            return Chunk(queries, queries, window, None)
        span = _blocks_seen(item.start, end, window, size)
        blocks = self._put(np.array(item.seq.block_ids[span.start : span.stop]))
        return Chunk(queries, range(span.start * size, span.stop * size), window, blocks)

    def _put(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self.geometry.device)


def _row_order(item: PlanItem) -> tuple[bool, int]:
    """Single tokens first, those with the longest context first; chunks as planned."""
    return (True, 0) if item.num_tokens > 1 else (False, -item.start)


def _blocks_seen(first: int, end: int, window: int | None, block_size: int) -> range:
    """Blocks of a sequence that queries at positions [first, end) may see."""
    oldest = 0 if window is None else max(0, first - window + 1)
    return range(oldest // block_size, -(-end // block_size))


def _group_ends(num_keys: Sequence[int]) -> Iterator[int]:
    """Splits lengths, longest first, where padding all that follow to this length would cost more than a group more."""
    if not num_keys:
        return
    longest = num_keys[0]
    for i, length in enumerate(num_keys):
        if (longest - length) * (len(num_keys) - i) > _GROUP_COST_KEYS:
            yield i
            longest = length
    yield len(num_keys)
