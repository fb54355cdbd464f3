"""The decoder over packed tokens: one forward pass for any mix of prompts' chunks and single decode steps.

Tokens of all sequences lie behind one another; only attention knows which belong together, so it is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from replicas.engine.families import DecoderSpec
from replicas.engine.rope import rotate
from replicas.engine.weights import DecoderWeights, LayerWeights

Attend: TypeAlias = Callable[[int, Tensor], Tensor]
"""(layer, qkv with q and k turned: [num_tokens, num_heads + 2 num_kv_heads, head_dim]) → [num_tokens, num_heads *
head_dim]."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Weights with their description. `turns` is the table of `rope_table` on the weights' device."""

    spec: DecoderSpec
    weights: DecoderWeights
    turns: Tensor  # [max_len, head_dim // 2] complex64

    def hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Runs all layers. token_ids, positions: [num_tokens] int64 → [num_tokens, hidden], before the last norm."""
        x = F.embedding(token_ids, self.weights.embedding)
        turns = self.turns[positions].unsqueeze(1)  # [num_tokens, 1, head_dim // 2]
        for i, layer in enumerate(self.weights.layers):
            h = self._norm(x, layer.input_norm)
            x = layer.output(attend(i, self._qkv(layer, h, turns))).add_(x)
            h = self._norm(x, layer.mlp_norm)
            x = layer.down(_gated(layer.gate_up(h))).add_(x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [num_rows, hidden] → [num_rows, vocab] float32."""
        return self.weights.head(self._norm(hidden, self.weights.norm)).float()

    def _qkv(self, layer: LayerWeights, h: Tensor, turns: Tensor) -> Tensor:
        spec = self.spec
        q_end, k_end = spec.num_heads, spec.num_heads + spec.num_kv_heads
        qkv = layer.qkv(h).view(h.shape[0], k_end + spec.num_kv_heads, spec.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            qkv[:, :q_end] = self._norm(qkv[:, :q_end], layer.q_norm)
            qkv[:, q_end:k_end] = self._norm(qkv[:, q_end:k_end], layer.k_norm)
        rotate(qkv[:, :k_end], turns)
        return qkv

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.spec.rms_norm_eps)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
