"""The decoder over packed tokens: one forward pass for any mix of prompts' chunks and single decode steps.

Tokens of all sequences lie behind one another; only attention knows which belong together, so it is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

from replicas.engine.families import DecoderSpec
from replicas.engine.linear import Linear
from replicas.engine.pointwise import Pointwise, TorchPointwise
from replicas.engine.rope import rotate
from replicas.engine.weights import DecoderWeights, LayerWeights

Attend: TypeAlias = Callable[[int, Tensor], Tensor]
"""(layer, qkv with q and k turned: [num_tokens, num_heads + 2 num_kv_heads, head_dim]) → [num_tokens, num_heads *
head_dim]."""

Product: TypeAlias = Literal["qkv", "output", "gate_up", "down"]
"""A layer's linear products, as `LayerWeights` names them."""

Adapt: TypeAlias = Callable[[Tensor, Tensor, int, Product], None]
"""(y, x, layer, product): adds to y in place what adapters add to that product of x."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Weights with their description. `turns` is the table of `rope_table` on the weights' device."""

    spec: DecoderSpec
    weights: DecoderWeights
    turns: Tensor  # [max_len, head_dim // 2] complex64
    pointwise: Pointwise = field(default_factory=TorchPointwise)

    def hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend, adapt: Adapt | None = None) -> Tensor:
        """Runs all layers. token_ids, positions: [num_tokens] int64 → [num_tokens, hidden], before the last norm."""

        def project(linear: Linear, x: Tensor, layer: int, product: Product) -> Tensor:
            y = linear(x)
            if adapt is not None:
                adapt(y, x, layer, product)
            return y

        x = self.weights.embedding(token_ids)
        turns = self.turns[positions].unsqueeze(1)  # [num_tokens, 1, head_dim // 2]
        for i, layer in enumerate(self.weights.layers):
            qkv = project(layer.qkv, self._norm(x, layer.input_norm), i, "qkv")
            x = project(layer.output, attend(i, self._turned(layer, qkv, turns)), i, "output").add_(x)
            gate_up = project(layer.gate_up, self._norm(x, layer.mlp_norm), i, "gate_up")
            x = project(layer.down, self.pointwise.gate(gate_up), i, "down").add_(x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [num_rows, hidden] → [num_rows, vocab] float32."""
        return self.scores(self.features(hidden))

    def features(self, hidden: Tensor) -> Tensor:
        """The last norm: what logits are a product of. [num_rows, hidden] → the same shape."""
        return self._norm(hidden, self.weights.norm)

    def scores(self, features: Tensor) -> Tensor:
        """[num_rows, hidden] → [num_rows, vocab] float32."""
        return self.weights.head(features).float()

    def _turned(self, layer: LayerWeights, qkv: Tensor, turns: Tensor) -> Tensor:
        """Heads, normed where the family does so; q and k at their positions."""
        spec = self.spec
        q_end, k_end = spec.num_heads, spec.num_heads + spec.num_kv_heads
        qkv = qkv.view(qkv.shape[0], k_end + spec.num_kv_heads, spec.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            qkv[:, :q_end] = self._norm(qkv[:, :q_end], layer.q_norm)
            qkv[:, q_end:k_end] = self._norm(qkv[:, q_end:k_end], layer.k_norm)
        rotate(qkv[:, :k_end], turns)
        return qkv

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.pointwise.norm(x, weight, self.spec.rms_norm_eps)
