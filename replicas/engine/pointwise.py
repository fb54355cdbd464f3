"""What a decoder computes between its products: norms and gates."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Pointwise(Protocol):
    """Results are freshly allocated, in the input's dtype."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm over the last dimension. x: [..., columns], weight: [columns] → like x."""
        ...

    def gate(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up. [num_tokens, 2 * columns], gate before up → [num_tokens, columns]."""
        ...


class TorchPointwise:
    """torch's own operators: any device, any dtype."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
