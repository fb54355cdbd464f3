"""Matrix products with fixed weights, laid out once for the processor at hand.

On x86 CPUs oneDNN's packed layout reads weights 2-3 times as fast as the plain one at small batches, and its layout
does not depend on the batch size (docs/decisions/ has the figures). Elsewhere, and on CUDA, the plain product is used.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Any hint above one row gives the layout that serves every batch size.
_PACK_ROWS = 32


class Linear(Protocol):
    """y = x Wᵀ + b."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] → [num_tokens, out_features], same dtype, freshly allocated."""
        ...


class PlainLinear:
    """Weights as they are: [out_features, in_features]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias
        self.num_bytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PackedLinear:
    """Weights in oneDNN's own layout; the plain copy is not kept."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
        self.bias = bias
        self.num_bytes = weight.nbytes
        self._product = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._product(x, self.weight, self.bias, "none", [], "")
        return y


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ by oneDNN for a weight used once: [rows, in_features], [out_features, in_features] → [rows, out_features].

    Only where `can_pack` says so. Strided operands are copied: on those oneDNN takes its reference loops, 200 times
    as slow.
    """
    operands = (x.contiguous(), weight.contiguous())
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(*operands, None, "none", [], "")
    return y


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest product that this weight's device and dtype have. weight: [out_features, in_features]."""
    return PackedLinear(weight, bias) if can_pack(weight) else PlainLinear(weight, bias)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a packed product here: an x86 CPU with float32, or with bfloat16 where it can compute it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or torch.ops.mkldnn._is_mkldnn_acl_supported():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
