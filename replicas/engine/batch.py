"""Turns a plan into tensors. Rows of the packed batch: single tokens first, by context length, then those with drafts
behind them, then chunks.

rows   | decode, longest … shortest | with drafts, longest … shortest | chunk of a | chunk of b |
         └ groups of similar length ┘  └─── groups of similar length ──┘
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
from replicas.engine.kv_rows import KvRows
from replicas.engine.lora.rows import LoraRows, Span
from replicas.engine.lora.store import LoraStore
from replicas.engine.prefill import Chunk, ChunkAttention, ChunkKernel, visibility_bias
from replicas.engine.sequence import Plan, PlanItem
from replicas.engine.sequence import Sequence as Request
from replicas.engine.verify import GatherVerify, Queries, VerifyAttention, VerifyKernel, visible_keys

Ints = npt.NDArray[np.int64]

# A group more costs about as much time in a layer as this many padded keys (one CPU core, 3 KV heads of 64).
_GROUP_COST_KEYS = 256


@dataclass(frozen=True, slots=True)
class AttentionView:
    """A step's attention for layers with the same window: rows of the packed batch, and who attends for them, in order.

    `writes`: cache rows of every k and v head of every token, [num_tokens * 2 num_kv_heads].
    """

    geometry: KvGeometry
    writes: Tensor
    decodes: tuple[tuple[slice, Decode], ...]
    verifies: tuple[tuple[slice, VerifyAttention], ...]
    chunks: tuple[tuple[slice, ChunkAttention], ...]

    def __call__(self, qkv: Tensor, cache: KvRows) -> Tensor:
        """Writes k and v into the layer's cache, then attends. → [num_tokens, num_heads * head_dim]."""
        num_heads = self.geometry.num_heads
        cache.write(self.writes, qkv[:, num_heads:].reshape(-1, self.geometry.head_dim))
        parts = [decode(qkv[rows, :num_heads], cache) for rows, decode in self.decodes]
        parts += [verify(qkv[rows, :num_heads], cache) for rows, verify in self.verifies]
        parts += [chunk(qkv[rows], cache) for rows, chunk in self.chunks]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.flatten(1)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's input. `last_rows[i]` is the row of plan item i's last token; `first_rows[i]` of its first.

    `views[window]`: attention of the layers with that window. `lora`: the rows that have adapters; None without any.
    """

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    first_rows: tuple[int, ...]
    last_rows: tuple[int, ...]
    views: Mapping[int | None, AttentionView]
    lora: LoraRows | None = None


@dataclass(frozen=True, slots=True)
class Batcher:
    """Builds `StepBatch`es for one cache. `windows` are the different ones among the layers; `adapters`: those that
    items may name, where the engine can have any."""

    geometry: KvGeometry
    decode: DecodeKernel
    chunk: ChunkKernel
    windows: frozenset[int | None]
    adapters: LoraStore | None = None
    verify: VerifyKernel = GatherVerify

    def build(self, plan: Plan) -> StepBatch:
        """The tensors of a plan that has items."""
        order = sorted(range(len(plan.items)), key=lambda i: _row_order(plan.items[i]))
        items = [plan.items[i] for i in order]
        lengths = [item.num_tokens for item in items]
        ends = np.cumsum(lengths)
        first, last = [0] * len(items), [0] * len(items)
        for i, item, end in zip(order, items, ends.tolist(), strict=True):
            first[i], last[i] = end - item.num_tokens, end - 1
        tokens = chain.from_iterable(_token_ids(item) for item in items)
        slots = np.array([item.start for item in items])
        if len(items) < ends[-1]:
            slots = np.repeat(slots + lengths - ends, lengths) + np.arange(ends[-1])
        writes = self._put(self._writes(items, slots, lengths))
        num_decodes = sum(length == 1 for length in lengths)
        num_short = num_decodes + sum(bool(item.drafts) for item in items[num_decodes:])
        return StepBatch(
            token_ids=torch.tensor(list(tokens), dtype=torch.int64).to(self.geometry.device),
            positions=self._put(_positions(items[num_decodes:num_short], slots, num_decodes)),
            first_rows=tuple(first),
            last_rows=tuple(last),
            views={
                window: AttentionView(
                    self.geometry,
                    writes,
                    tuple(self._decodes(items[:num_decodes], window)),
                    tuple(self._verifies(items[num_decodes:num_short], window, num_decodes)),
                    tuple(self._chunks(items[num_short:], window, sum(item.num_tokens for item in items[:num_short]))),
                )
                for window in self.windows
            },
            lora=self._lora(items, ends.tolist()),
        )

    def _lora(self, items: Sequence[PlanItem], ends: Sequence[int]) -> LoraRows | None:
        if self.adapters is None or all(item.seq.request.adapter is None for item in items):
            return None
        spans = [Span(i.seq.request.adapter, end - i.num_tokens, end) for i, end in zip(items, ends, strict=True)]
        return self.adapters.rows(spans)

    def slot_rows(self, seq: Request, slots: Ints) -> Ints:
        """Cache rows of every k and v head of the tokens in some slots. [num_slots * 2 num_kv_heads]"""
        size = self.geometry.block_size
        first = slots.min() // size
        return self._rows(np.array(seq.block_ids[first : slots.max() // size + 1])[slots // size - first], slots)

    def _writes(self, items: Sequence[PlanItem], slots: Ints, lengths: Sequence[int]) -> Ints:
        """`slot_rows` of all items, whose slots lie behind one another, at once."""
        size = self.geometry.block_size
        blocks: list[int] = []
        shifts = []
        for item in items:
            first = item.start // size
            shifts.append(len(blocks) - first)
            blocks += item.seq.block_ids[first : (item.start + item.num_tokens - 1) // size + 1]
        shift = np.array(shifts)
        if len(items) < len(slots):
            shift = np.repeat(shift, lengths)
        return self._rows(np.array(blocks)[slots // size + shift], slots)

    def _rows(self, blocks: Ints, slots: Ints) -> Ints:
        """Cache rows of every k and v head of tokens in those blocks."""
        size, num_heads = self.geometry.block_size, 2 * self.geometry.num_kv_heads
        rows: Ints = (blocks[:, None] * num_heads + np.arange(num_heads)) * size + (slots % size)[:, None]
        return rows.reshape(-1)

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

    def _verifies(
        self, items: Sequence[PlanItem], window: int | None, row: int
    ) -> Iterator[tuple[slice, VerifyAttention]]:
        """Groups of sequences with drafts, padded to the longest context and to the most drafts of the group."""
        size = self.geometry.block_size
        spans = [_blocks_seen(item.start, item.start + item.num_tokens, window, size) for item in items]
        first = 0
        for end in _group_ends([len(span) * size for span in spans]):
            group = items[first:end]
            tables = np.zeros((end - first, max(map(len, spans[first:end]))), dtype=np.int64)
            rows, visible = [], []
            for table, item, span in zip(tables, group, spans[first:end], strict=True):
                table[: len(span)] = item.seq.block_ids[span.start : span.stop]
                rows.append(range(row, row + item.num_tokens))
                row += item.num_tokens
                visible.append(
                    visible_keys(item.start, item.drafts, range(span.start * size, span.stop * size), window)
                )
            queries = Queries(rows, self._put(tables), visible)
            yield slice(rows[0].start, row), self.verify(self.geometry, queries)
            first = end

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
        # A cache that rounds is read even by the first chunk: an answer must not depend on how its prompt was cut.
        if item.start == 0 and self.geometry.stored == "auto":
            return Chunk(queries, queries, window, None)
        span = _blocks_seen(item.start, end, window, size)
        blocks = self._put(np.array(item.seq.block_ids[span.start : span.stop]))
        return Chunk(queries, range(span.start * size, span.stop * size), window, blocks)

    def _put(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self.geometry.device)


def _row_order(item: PlanItem) -> tuple[int, int]:
    """Single tokens first, then those with drafts, the longest context first; chunks as planned."""
    if item.num_tokens == 1:
        return 0, -item.start
    return (1, -item.start) if item.drafts else (2, 0)


def _token_ids(item: PlanItem) -> Sequence[int]:
    return item.token_ids if item.drafts else item.seq.tokens[item.start : item.start + item.num_tokens]


def _positions(drafted: Sequence[PlanItem], slots: Ints, row: int) -> Ints:
    """Positions of all tokens: their slots, but for guesses in trees. `row`: of the first item with drafts."""
    if all(item.drafts.is_chain for item in drafted):
        return slots
    positions = slots.copy()
    for item in drafted:
        end = row + item.num_tokens
        positions[row + item.num_known - 1 : end] = item.start + item.num_known - 1 + np.array(item.drafts.depths)
        row = end
    return positions


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
