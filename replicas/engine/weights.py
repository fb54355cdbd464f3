"""A decoder's weights from any source, converted and laid out once: quantised matrices become their own products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from replicas.contract import EngineError
from replicas.engine.families import DecoderSpec
from replicas.engine.linear import Linear, make_linear
from replicas.engine.quantization.linears import (
    DequantisingLinear,
    KernelLinear,
    QuantisedLinears,
    SplitLinear,
    rows_of,
)
from replicas.engine.quantization.matrix import Quantised, stacked
from replicas.engine.quantization.source import EMBEDDING, HEAD, WeightSource
from replicas.engine.rope import pair_order
from replicas.engine.tensors import Checkpoint

__all__ = ["Checkpoint", "DecoderWeights", "Embedding", "LayerWeights", "WeightLoader"]


class Embedding(Protocol):
    """A vector per token."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids: [num_tokens] → [num_tokens, hidden] in the decoder's dtype, freshly allocated."""
        ...


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Heads of q and k are in `pair_order`; `q_norm` and `k_norm` too."""

    input_norm: Tensor  # [hidden]
    qkv: Linear  # hidden → (num_heads + 2 num_kv_heads) * head_dim: q, k, v
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    output: Linear  # num_heads * head_dim → hidden
    mlp_norm: Tensor  # [hidden]
    gate_up: Linear  # hidden → 2 * intermediate: gate, up
    down: Linear  # intermediate → hidden


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole decoder, on one device in one dtype."""

    embedding: Embedding  # vocab → hidden
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # [hidden]
    head: Linear  # hidden → vocab


def weight_bytes(weights: DecoderWeights) -> int:
    """What the matrices take in memory; what several share counts once."""
    matrices: list[object] = [weights.head]
    embedding = weights.embedding
    matrices.append(embedding.matrix if isinstance(embedding, QuantisedEmbedding) else embedding)
    matrices += [m for layer in weights.layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    return sum(getattr(matrix, "num_bytes", 0) for matrix in {id(matrix): matrix for matrix in matrices}.values())


class PlainEmbedding:
    """A table, in its file's dtype where that is narrower than the decoder's: [vocab, hidden]. It is copied: what is
    mapped changes with its file."""

    def __init__(self, table: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        kept = table.dtype if table.dtype.itemsize < dtype.itemsize else dtype
        self._table = table.to(device=device, dtype=kept, copy=True)
        self.vocab_size = table.shape[0]
        self.num_bytes = self._table.nbytes
        self.dtype, self.device = dtype, self._table.device

    def __call__(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self._table).to(self.dtype)


class QuantisedEmbedding:
    """Rows of a quantised matrix, dequantised as they are asked for; tied embeddings share the head's."""

    def __init__(self, matrix: KernelLinear | DequantisingLinear, dtype: torch.dtype, device: torch.device) -> None:
        self.matrix = matrix
        self.vocab_size = matrix.num_rows
        self.dtype, self.device = dtype, device

    def __call__(self, token_ids: Tensor) -> Tensor:
        return rows_of(self.matrix, token_ids).to(self.dtype)


@dataclass(frozen=True, slots=True)
class WeightLoader:
    """Turns a source into `DecoderWeights`: one tensor at a time is held twice, never the model. `linears` makes the
    products of quantised matrices; without it they run on torch's own operators."""

    checkpoint: WeightSource
    spec: DecoderSpec
    dtype: torch.dtype
    device: torch.device
    linears: QuantisedLinears | None = None

    def load(self) -> DecoderWeights:
        """Reads everything. Raises EngineError for a missing tensor or a shape that config.json does not imply."""
        embedding, head = self._ends()
        return DecoderWeights(
            embedding=embedding,
            layers=tuple(self._layer(f"model.layers.{i}.") for i in range(self.spec.num_layers)),
            norm=self._tensor("model.norm.weight", (self.spec.hidden_size,)),
            head=head,
        )

    def _ends(self) -> tuple[Embedding, Linear]:
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        table = self.checkpoint.matrix(EMBEDDING, shape)
        tied = self.spec.tied_embeddings or f"{HEAD}.weight" not in self.checkpoint
        if not isinstance(table, Quantised):
            head = table if tied else self.checkpoint.matrix(HEAD, shape)
            return PlainEmbedding(table, self.dtype, self.device), self._product([head], None)
        rows = self._quantised(table, None)
        embedding = QuantisedEmbedding(rows, self.dtype, self.device)
        return embedding, rows if tied else self._product([self.checkpoint.matrix(HEAD, shape)], None)

    def _layer(self, prefix: str) -> LayerWeights:
        spec = self.spec
        hidden, heads = spec.hidden_size, (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv = [
            (attention + name, count * spec.head_dim)
            for name, count in zip(("q_proj", "k_proj", "v_proj"), heads, strict=True)
        ]
        gate_up = [(mlp + name, spec.intermediate_size) for name in ("gate_proj", "up_proj")]
        return LayerWeights(
            input_norm=self._tensor(prefix + "input_layernorm.weight", (hidden,)),
            qkv=self._fused(qkv, hidden, spec.qkv_bias, rotated=2),
            q_norm=self._head_norm(attention + "q_norm.weight"),
            k_norm=self._head_norm(attention + "k_norm.weight"),
            output=self._fused([(attention + "o_proj", hidden)], spec.num_heads * spec.head_dim, spec.output_bias),
            mlp_norm=self._tensor(prefix + "post_attention_layernorm.weight", (hidden,)),
            gate_up=self._fused(gate_up, hidden, spec.mlp_bias),
            down=self._fused([(mlp + "down_proj", hidden)], spec.intermediate_size, spec.mlp_bias),
        )

    def _fused(self, parts: list[tuple[str, int]], in_features: int, has_bias: bool, rotated: int = 0) -> Linear:
        """One product out of several with the same input; the first `rotated` parts get their heads in pair order."""
        matrices = []
        for i, (name, rows) in enumerate(parts):
            matrix = self.checkpoint.matrix(name, (rows, in_features))
            matrices.append(self._in_pairs(matrix) if i < rotated else matrix)
        if not has_bias:
            return self._product(matrices, None)
        biases = [self._checked(f"{name}.bias", (rows,)) for name, rows in parts]
        biases = [self._bias_in_pairs(bias) if i < rotated else bias for i, bias in enumerate(biases)]
        return self._product(matrices, torch.cat(biases).to(device=self.device, dtype=self.dtype))

    def _product(self, matrices: Sequence[Tensor | Quantised], bias: Tensor | None) -> Linear:
        """Matrices with the same input as one product, or as one behind the other where they differ in kind."""
        plain = [matrix for matrix in matrices if isinstance(matrix, Tensor)]
        if len(plain) == len(matrices):
            return make_linear(self._joined(plain), bias)
        quantised = [matrix for matrix in matrices if isinstance(matrix, Quantised)]
        whole = stacked(quantised) if len(quantised) == len(matrices) else None
        if whole is not None:
            return self._quantised(whole, bias)
        rows = [m.rows if isinstance(m, Quantised) else m.shape[0] for m in matrices]
        biases = [None] * len(rows) if bias is None else list(torch.split(bias, rows))
        return SplitLinear([self._product([m], b) for m, b in zip(matrices, biases, strict=True)])

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        weight = torch.empty(sum(map(len, parts)), parts[0].shape[1], dtype=self.dtype, device=self.device)
        start = 0
        for part in parts:
            weight[start : start + len(part)] = part
            start += len(part)
        return weight

    def _quantised(self, matrix: Quantised, bias: Tensor | None) -> KernelLinear | DequantisingLinear:
        return (self.linears or QuantisedLinears(None, self.device)).linear(matrix, bias)

    def _in_pairs(self, matrix: Tensor | Quantised) -> Tensor | Quantised:
        """A projection's rows, each head's in `pair_order`."""
        order = self._pair_rows(matrix.rows if isinstance(matrix, Quantised) else matrix.shape[0])
        return matrix.take(order) if isinstance(matrix, Quantised) else matrix[order]

    def _bias_in_pairs(self, bias: Tensor) -> Tensor:
        return bias[self._pair_rows(bias.shape[0])]

    def _pair_rows(self, num_rows: int) -> Tensor:
        return torch.arange(num_rows).view(-1, self.spec.head_dim)[:, pair_order(self.spec.head_dim)].flatten()

    def _head_norm(self, name: str) -> Tensor | None:
        if not self.spec.qk_norm:
            return None
        return self._tensor(name, (self.spec.head_dim,))[pair_order(self.spec.head_dim).to(self.device)]

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._checked(name, shape).to(device=self.device, dtype=self.dtype, copy=True)

    def _checked(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.checkpoint.get(name)
        if tuple(tensor.shape) != shape:
            raise EngineError(f"{name} has shape {tuple(tensor.shape)}, config.json implies {shape}")
        return tensor
