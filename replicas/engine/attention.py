"""Attention over a paged KV cache.

One layer's cache, seen as rows of one head of one token:

    block ┬ k head 0 ─ token 0 … block_size - 1      row = (block * 2 num_kv_heads + head) * block_size + offset
          ├ k head 1                                  v heads follow the k heads
          ├ v head 0
          └ v head 1

Heads before tokens, so that a head's keys in a block are neighbours: measured on one CPU core this reads 1.2-1.7 times
as fast as tokens before heads. What a step needs to know (rows, masks) is worked out once per step, not per layer.

Here single tokens attend, in groups of similar context length; chunks of prompts do in `prefill`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from replicas.engine.families import DecoderSpec
from replicas.engine.kernels.library import Kernels
from replicas.engine.kv_rows import KvDtype, KvRows, PlainRows, RowKind, make_rows, row_bytes

_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """What attention needs to know about a decoder and its cache, which keeps values as `stored`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    device: torch.device
    stored: KvDtype = "auto"

    @classmethod
    def of(cls, spec: DecoderSpec, block_size: int, dtype: torch.dtype, device: torch.device) -> KvGeometry:
        return cls(spec.num_heads, spec.num_kv_heads, spec.head_dim, block_size, dtype, device)

    def storing(self, stored: KvDtype) -> KvGeometry:
        """The same with a cache of another kind."""
        return replace(self, stored=stored)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim)

    @property
    def rows_per_block(self) -> int:
        return 2 * self.num_kv_heads * self.block_size

    def key_rows(self, blocks: Tensor, heads: Tensor) -> Tensor:
        """Rows of every key in some blocks; its value lies `value_offset` further.

        blocks: [..., num_blocks], heads: [num_heads] → [..., num_heads, num_blocks * block_size].
        """
        offsets = torch.arange(self.block_size, device=blocks.device)
        block_heads = blocks.unsqueeze(-2) * (2 * self.num_kv_heads) + heads[:, None]  # [..., num_heads, num_blocks]
        return (block_heads.unsqueeze(-1) * self.block_size + offsets).flatten(-2)

    @property
    def value_offset(self) -> int:
        return self.num_kv_heads * self.block_size


class KvCache:
    """The blocks of all layers. `layers[i]` has num_blocks * rows_per_block rows of head_dim."""

    def __init__(self, geometry: KvGeometry, num_layers: int, num_blocks: int, kernels: Kernels | None = None) -> None:
        shape = (num_blocks * geometry.rows_per_block, geometry.head_dim)
        kind = RowKind(geometry.stored, geometry.dtype, geometry.device, kernels)
        self.layers = [make_rows(shape, kind) for _ in range(num_layers)]
        self.kernels = kernels
        self.num_blocks = num_blocks
        self._device = geometry.device

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks, (source, target) each; no target is a source."""
        source, target = torch.tensor(pairs, device=self._device).unbind(1)
        for tensor in self._tensors():
            blocks = tensor.view(self.num_blocks, -1)
            blocks[target] = blocks[source]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copies single rows, in every layer. source, target: [num_rows] int64; a target may be another's source."""
        for tensor in self._tensors():
            tensor.index_copy_(0, target, tensor.index_select(0, source))

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            yield from layer.tensors


def block_bytes(spec: DecoderSpec, block_size: int, dtype: torch.dtype, stored: KvDtype = "auto") -> int:
    """Bytes of one block over all layers."""
    return spec.num_layers * block_size * 2 * spec.num_kv_heads * row_bytes(spec.head_dim, stored, dtype)


@dataclass(frozen=True, slots=True)
class Context:
    """What queries may see. `blocks`: [..., num_blocks] int64; `bias`: [..., num_blocks * block_size], 0 or -inf."""

    blocks: Tensor
    bias: Tensor


class Decode(Protocol):
    """Attention of single tokens, one per sequence: prepared once per step, called once per layer."""

    def __call__(self, q: Tensor, cache: KvRows) -> Tensor:
        """q: [num_seqs, num_heads, head_dim], cache: a layer → [num_seqs, num_heads, head_dim]."""
        ...


class SparseDecode:
    """Reads the cache in place: q·k as a sampled dense-dense product, Σ p·v as an embedding bag. CPU, float32, plain
    rows.

    Nothing is gathered, which halves the memory traffic; torch has no other kernel that reads rows through an index.
    """

    def __init__(self, geometry: KvGeometry, context: Context) -> None:
        num_seqs, num_keys = context.bias.shape
        num_queries = num_seqs * geometry.num_heads
        heads = torch.arange(geometry.num_heads) // geometry.group
        keys = geometry.key_rows(context.blocks, heads).flatten()  # [num_seqs * num_heads * num_keys]
        self._shape = (num_seqs, geometry.num_heads, num_keys)
        self._scale = geometry.scale
        self._bias = context.bias[:, None]
        self._values = (keys + geometry.value_offset).int()
        self._bags = torch.arange(num_queries, dtype=torch.int32) * num_keys
        self._pattern = (
            torch.arange(num_queries + 1, dtype=torch.int32) * num_keys,
            keys.int(),
            torch.zeros(keys.shape),
        )
        self._sparse: Tensor | None = None

    def __call__(self, q: Tensor, cache: KvRows) -> Tensor:
        assert isinstance(cache, PlainRows)
        values = cache.values
        q = q.flatten(0, 1)
        if self._sparse is None:  # its shape needs the cache's
            size = (q.shape[0], values.shape[0])
            self._sparse = torch.sparse_csr_tensor(*self._pattern, size, check_invariants=False)
        scores = torch.sparse.sampled_addmm(self._sparse, q, values.t(), beta=0.0, alpha=self._scale).values()
        weights = torch.softmax(scores.view(self._shape).add_(self._bias), dim=-1)
        out = F.embedding_bag(self._values, values, self._bags, mode="sum", per_sample_weights=weights.flatten())
        return out.view(self._shape[0], self._shape[1], -1)


class GatherDecode:
    """Gathers keys and values, then plain products. Any device, any dtype."""

    def __init__(self, geometry: KvGeometry, context: Context) -> None:
        heads = torch.arange(geometry.num_kv_heads, device=context.blocks.device)
        keys = geometry.key_rows(context.blocks, heads)  # [num_seqs, num_kv_heads, num_keys]
        self._rows_shape = (*keys.shape, geometry.head_dim)
        self._keys = keys.flatten()
        self._values = self._keys + geometry.value_offset
        self._bias = context.bias[:, None, None].to(geometry.dtype)
        self._scale = geometry.scale
        self._group = geometry.group

    def __call__(self, q: Tensor, cache: KvRows) -> Tensor:
        k = cache.read(self._keys).view(self._rows_shape)
        v = cache.read(self._values).view(self._rows_shape)
        q = q.view(q.shape[0], -1, self._group, q.shape[-1])  # [num_seqs, num_kv_heads, group, head_dim]
        scores = torch.matmul(q * self._scale, k.transpose(-1, -2)) + self._bias
        return torch.matmul(torch.softmax(scores, dim=-1), v).flatten(1, 2)


DecodeKernel: TypeAlias = Callable[[KvGeometry, Context], Decode]


def pick_decode(geometry: KvGeometry, num_blocks: int) -> DecodeKernel:
    """The fastest of torch's ways that this device, dtype and torch build have."""
    fits = num_blocks * geometry.rows_per_block <= _MAX_INT32
    plain = geometry.device.type == "cpu" and geometry.dtype == torch.float32 and geometry.stored == "auto"
    if plain and fits and has_sampled_product():
        return SparseDecode
    return GatherDecode


def has_sampled_product() -> bool:
    """Whether this torch build has the sampled product on CPU (some come without). Tried, because nothing tells."""
    ones = torch.ones(1, 1)
    zero, one = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "beta state", said once per process
            pattern = torch.sparse_csr_tensor(zero, one, torch.zeros(1), (1, 1), check_invariants=False)
            product = torch.sparse.sampled_addmm(pattern, ones, ones, beta=0.0)
    except (RuntimeError, NotImplementedError):
        return False
    return bool(product.values().item() == 1.0)
