"""Attention of last tokens with guesses behind them: a few queries of each of several sequences, chains or trees.

slots    known tokens ……………… │ row 0 │ row 1 │ row 2 │ row 3 …     row r lies r slots behind row 0, and sees the
row 2 sees  all of them           yes     if ancestor  yes            known tokens, its ancestors and itself
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from replicas.engine.attention import Context, DecodeKernel, KvGeometry
from replicas.engine.drafts import Drafts
from replicas.engine.kv_rows import KvRows

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Queries:
    """Sequence i has the packed batch's rows `rows[i]`, which see `visible[i]` of the keys in its blocks: [num_rows of
    i, up to num_blocks * block_size]. `blocks`: [num_seqs, num_blocks] int64, padded."""

    rows: Sequence[range]
    blocks: Tensor
    visible: Sequence[Bools]


class VerifyAttention(Protocol):
    """Prepared once per step, called once per layer. The rows of all sequences lie behind one another."""

    def __call__(self, q: Tensor, cache: KvRows) -> Tensor:
        """q: [num_rows of all, num_heads, head_dim], cache: a layer that holds their keys already → like q."""
        ...


class GatherVerify:
    """Keys and values gathered once per sequence, then plain products for all of its rows. Any device, any dtype."""

    def __init__(self, geometry: KvGeometry, queries: Queries) -> None:
        heads = torch.arange(geometry.num_kv_heads, device=geometry.device)
        keys = geometry.key_rows(queries.blocks, heads)  # [num_seqs, num_kv_heads, num_keys]
        num_seqs, num_rows = len(queries.rows), max(map(len, queries.rows))
        first = queries.rows[0].start
        # Sequences with fewer rows than others repeat their first; those results are left out again.
        picked = np.zeros((num_seqs, num_rows), dtype=np.int64)
        visible = np.zeros((num_seqs, num_rows, keys.shape[-1]), dtype=np.bool_)
        for i, (rows, seen) in enumerate(zip(queries.rows, queries.visible, strict=True)):
            picked[i] = rows.start - first
            picked[i, : len(rows)] = np.arange(rows.start - first, rows.stop - first)
            visible[i, : len(rows), : seen.shape[1]] = seen
            visible[i, len(rows) :, : seen.shape[1]] = seen[0]
        valid = np.concatenate([i * num_rows + np.arange(len(rows)) for i, rows in enumerate(queries.rows)])
        bias = torch.zeros(visible.shape, dtype=geometry.dtype, device=geometry.device)
        bias.masked_fill_(torch.from_numpy(~visible).to(geometry.device), float("-inf"))
        self._geometry = geometry
        self._keys = keys.flatten()
        self._keys_shape = (*keys.shape, geometry.head_dim)
        self._picked = torch.from_numpy(picked.reshape(-1)).to(geometry.device)
        self._valid = torch.from_numpy(valid).to(geometry.device)
        self._is_padded = len(valid) < num_seqs * num_rows
        self._bias = bias[:, None, :, None]  # [num_seqs, 1, num_rows, 1, num_keys]
        self._shape = (num_seqs, num_rows, geometry.num_kv_heads, geometry.group, geometry.head_dim)

    def __call__(self, q: Tensor, cache: KvRows) -> Tensor:
        k = cache.read(self._keys).view(self._keys_shape)
        v = cache.read(self._keys + self._geometry.value_offset).view(self._keys_shape)
        if self._is_padded:
            q = q.index_select(0, self._picked)
        grouped = (q * self._geometry.scale).reshape(self._shape).transpose(1, 2)  # [seqs, kv_heads, rows, group, dim]
        scores = torch.matmul(grouped.flatten(2, 3), k.transpose(-1, -2)).view(*grouped.shape[:4], -1)
        weights = torch.softmax(scores.add_(self._bias), dim=-1)
        out = torch.matmul(weights.flatten(2, 3), v).view(grouped.shape).transpose(1, 2)
        out = out.reshape(-1, self._geometry.num_heads, self._geometry.head_dim)
        return out.index_select(0, self._valid) if self._is_padded else out


class SingleVerify:
    """Each row as if it were a sequence of its own, by a kernel for single tokens, which reads keys where they lie."""

    def __init__(self, decode: DecodeKernel, geometry: KvGeometry, queries: Queries) -> None:
        num_rows = [len(rows) for rows in queries.rows]
        tables = queries.blocks.repeat_interleave(torch.tensor(num_rows), dim=0)
        bias = torch.full((sum(num_rows), queries.blocks.shape[1] * geometry.block_size), float("-inf"))
        first = 0
        for count, seen in zip(num_rows, queries.visible, strict=True):
            bias[first : first + count, : seen.shape[1]].masked_fill_(torch.from_numpy(seen), 0.0)
            first += count
        self._decode = decode(geometry, Context(tables, bias))

    def __call__(self, q: Tensor, cache: KvRows) -> Tensor:
        return self._decode(q, cache)


VerifyKernel: TypeAlias = Callable[[KvGeometry, Queries], VerifyAttention]


def pick_verify(compiled: DecodeKernel | None) -> VerifyKernel:
    """The faster way. `compiled`: the kernel for single tokens, where there is one."""
    return GatherVerify if compiled is None else partial(SingleVerify, compiled)


def visible_keys(start: int, drafts: Drafts, keys: range, window: int | None) -> Bools:
    """Which of the slots `keys` row 0 at position `start` and the rows of its drafts see. [num_rows, num_keys]"""
    num_rows = len(drafts) + 1
    depths = np.array(drafts.depths)
    family = np.eye(num_rows, dtype=np.bool_)  # [row, row]: itself and its ancestors
    for row, parent in enumerate(drafts.parents, 1):
        family[row] |= family[parent]
    slots = np.arange(keys.start, keys.stop)
    # Slots hold positions in order, but for the guesses.
    positions = np.where(slots > start, 0, slots)
    inside = slots[(slots >= start) & (slots < start + num_rows)]
    positions[inside - keys.start] = start + depths[inside - start]
    visible = np.broadcast_to(slots < start, (num_rows, len(slots))).copy()
    visible[:, inside - keys.start] = family[:, inside - start]
    if window is not None:
        visible &= positions > (start + depths)[:, None] - window
    return visible
