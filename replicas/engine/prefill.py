"""Attention of chunks of prompts, one sequence at a time.

The first chunk's keys are its own, straight from the projection; later ones gather theirs from the cache. On CPU the
chunk is cut into tiles of queries, which multiply only the keys they can see and keep the scores in the core's cache:
1.7-2.3 times as fast there as torch's fused kernel, whose products are slow on some processors. A chunk of few queries
gathers nothing where there is a compiled kernel: with 8,000 keys, 8 queries take half the time that way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from replicas.engine.attention import Context, DecodeKernel, KvGeometry
from replicas.engine.kv_rows import KvRows
from replicas.engine.linear import can_pack, product

_TILE_QUERIES = 128

# Below this many scores a head group, oneDNN's product costs more to call than it gains.
_MIN_SCORES = 32_768

# From so many queries on, tiles use what they have gathered often enough (one CPU core, 3 KV heads of 64).
_MANY_QUERIES = 33


@dataclass(frozen=True, slots=True)
class Chunk:
    """Queries at positions `queries` of one sequence; keys at positions `keys`, a range that begins with a block.

    `blocks` hold the keys, [num_blocks] int64; None when the keys are the queries' own, which then start at 0.
    """

    queries: range
    keys: range
    window: int | None
    blocks: Tensor | None


class ChunkAttention(Protocol):
    """Prepared once per step, called once per layer."""

    def __call__(self, qkv: Tensor, cache: KvRows) -> Tensor:
        """qkv: [num_tokens, num_heads + 2 num_kv_heads, head_dim], cache: a layer that holds these tokens already →
        [num_tokens, num_heads, head_dim]."""
        ...


class TiledChunk:
    """Explicit products by tiles of queries. CPU."""

    def __init__(self, geometry: KvGeometry, chunk: Chunk) -> None:
        self._geometry = geometry
        self._keys = _Keys(geometry, chunk)
        self._tiles = tuple(_tiles(chunk, geometry))
        self._packs = can_pack(torch.empty(0, dtype=geometry.dtype)) and geometry.dtype == torch.float32

    def __call__(self, qkv: Tensor, cache: KvRows) -> Tensor:
        k, v = self._keys(qkv, cache)
        v = v.transpose(1, 2).contiguous()  # [num_kv_heads, head_dim, num_keys]
        q = _grouped(qkv, self._geometry) * self._geometry.scale
        out = torch.empty_like(q)
        for tile in self._tiles:
            seen = (k[:, tile.keys], v[:, :, tile.keys])
            out[:, :, tile.queries] = self._attend(q[:, :, tile.queries], seen, tile.bias)
        return _ungrouped(out)

    def _attend(self, q: Tensor, seen: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        """q: [num_kv_heads, group, num_queries, head_dim] → the same shape."""
        k, v = seen
        rows = q.flatten(1, 2)
        if not self._packs or rows.shape[1] * k.shape[1] < _MIN_SCORES:
            scores = torch.matmul(rows, k.transpose(1, 2)).view(*q.shape[:3], -1)
            weights = torch.softmax(scores.add_(bias), dim=-1)
            return torch.matmul(weights.flatten(1, 2), v.transpose(1, 2)).view_as(q)
        heads = []
        for one_q, one_k, one_v in zip(rows, k, v.contiguous(), strict=True):
            scores = product(one_q, one_k).view(*q.shape[1:3], -1)
            weights = torch.softmax(scores.add_(bias), dim=-1)
            heads.append(product(weights.flatten(0, 1), one_v))
        return torch.stack(heads).view_as(q)


class FusedChunk:
    """torch's scaled_dot_product_attention. Any device."""

    def __init__(self, geometry: KvGeometry, chunk: Chunk) -> None:
        self._geometry = geometry
        self._keys = _Keys(geometry, chunk)
        self._bias: Tensor | None = None
        sees_all = chunk.window is None or chunk.queries.stop <= chunk.window
        if chunk.blocks is not None or not sees_all:
            self._bias = visibility_bias(
                _positions(chunk.queries, geometry)[:, None], _positions(chunk.keys, geometry), chunk.window
            ).to(geometry.dtype)

    def __call__(self, qkv: Tensor, cache: KvRows) -> Tensor:
        geometry = self._geometry
        # Query heads of a group read the same keys: a dimension of stride 0 instead of copies.
        k, v = (x.unsqueeze(1).expand(-1, geometry.group, -1, -1) for x in self._keys(qkv, cache))
        q = _grouped(qkv, geometry)
        out = F.scaled_dot_product_attention(q, k, v, self._bias, is_causal=self._bias is None, scale=geometry.scale)
        return _ungrouped(out)


class SingleQueries:
    """Each query as if it were a sequence of its own, by a kernel for single tokens, which reads keys where they lie.
    Not for a first chunk, whose keys need not be in the cache in full precision."""

    def __init__(self, geometry: KvGeometry, chunk: Chunk, decode: DecodeKernel) -> None:
        assert chunk.blocks is not None, "keys are read from the cache"
        queries, keys = _positions(chunk.queries, geometry), _positions(chunk.keys, geometry)
        tables = chunk.blocks.expand(len(chunk.queries), -1)
        self._decode = decode(geometry, Context(tables, visibility_bias(queries[:, None], keys, chunk.window)))
        self._num_heads = geometry.num_heads

    def __call__(self, qkv: Tensor, cache: KvRows) -> Tensor:
        return self._decode(qkv[:, : self._num_heads], cache)


ChunkKernel: TypeAlias = Callable[[KvGeometry, Chunk], ChunkAttention]


def pick_chunk(geometry: KvGeometry, compiled: DecodeKernel | None = None) -> ChunkKernel:
    """The fastest way on this device. `compiled`: the kernel for single tokens, where there is one."""
    if geometry.device.type != "cpu":
        return FusedChunk
    return TiledChunk if compiled is None else partial(_tiled_or_single, compiled)


def _tiled_or_single(compiled: DecodeKernel, geometry: KvGeometry, chunk: Chunk) -> ChunkAttention:
    if chunk.blocks is None or len(chunk.queries) >= _MANY_QUERIES:
        return TiledChunk(geometry, chunk)
    return SingleQueries(geometry, chunk, compiled)


def visibility_bias(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """0 where a query may see a key, -inf elsewhere, float32. Both are positions, broadcast against each other."""
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))


class _Keys:
    """Where a chunk's keys and values come from: [num_kv_heads, num_keys, head_dim] each."""

    def __init__(self, geometry: KvGeometry, chunk: Chunk) -> None:
        self._geometry = geometry
        self._rows: Tensor | None = None
        if chunk.blocks is not None:
            heads = torch.arange(geometry.num_kv_heads, device=chunk.blocks.device)
            self._rows = geometry.key_rows(chunk.blocks, heads).flatten()

    def __call__(self, qkv: Tensor, cache: KvRows) -> tuple[Tensor, Tensor]:
        num_heads, num_kv_heads = self._geometry.num_heads, self._geometry.num_kv_heads
        if self._rows is None:
            # Dense, or oneDNN takes its reference loops: 200 times as slow.
            kv = qkv[:, num_heads:].transpose(0, 1).contiguous()
            return kv[:num_kv_heads], kv[num_kv_heads:]
        shape = (num_kv_heads, -1, self._geometry.head_dim)
        k = cache.read(self._rows).view(shape)
        v = cache.read(self._rows + self._geometry.value_offset).view(shape)
        return k, v


@dataclass(frozen=True, slots=True)
class _Tile:
    """Slices of a chunk's queries and keys. bias: [num_queries, num_keys]."""

    queries: slice
    keys: slice
    bias: Tensor


def _tiles(chunk: Chunk, geometry: KvGeometry) -> Iterator[_Tile]:
    size, first_key = geometry.block_size, chunk.keys.start
    for start in range(chunk.queries.start, chunk.queries.stop, _TILE_QUERIES):
        queries = range(start, min(start + _TILE_QUERIES, chunk.queries.stop))
        oldest = 0 if chunk.window is None else max(0, start - chunk.window + 1)
        # Whole blocks, so that shapes repeat: oneDNN compiles one product per shape.
        keys = range(max(first_key, oldest // size * size), min(-(-queries.stop // size) * size, chunk.keys.stop))
        bias = visibility_bias(_positions(queries, geometry)[:, None], _positions(keys, geometry), chunk.window)
        yield _Tile(
            slice(queries.start - chunk.queries.start, queries.stop - chunk.queries.start),
            slice(keys.start - first_key, keys.stop - first_key),
            bias.to(geometry.dtype),
        )


def _positions(span: range, geometry: KvGeometry) -> Tensor:
    return torch.arange(span.start, span.stop, device=geometry.device)


def _grouped(qkv: Tensor, geometry: KvGeometry) -> Tensor:
    """The queries as [num_kv_heads, group, num_tokens, head_dim]."""
    q = qkv[:, : geometry.num_heads].view(qkv.shape[0], geometry.num_kv_heads, geometry.group, -1)
    return q.permute(1, 2, 0, 3)


def _ungrouped(out: Tensor) -> Tensor:
    """The inverse of `_grouped`: [num_tokens, num_heads, head_dim]."""
    return out.permute(2, 0, 1, 3).flatten(1, 2)
