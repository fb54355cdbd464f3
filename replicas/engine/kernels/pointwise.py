"""Norms and gates by the compiled kernels, one pass each where torch takes several."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from replicas.engine.kernels.library import Kernels


class KernelPointwise:
    """Implements `model.Pointwise` for float32 on the CPU; leaves the rest to torch."""

    def __init__(self, kernels: Kernels) -> None:
        self._norm, self._gate = kernels.rms_norm, kernels.gate

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype != torch.float32 or not x.is_contiguous():
            return F.rms_norm(x, weight.shape, weight, eps)
        out, columns = torch.empty_like(x), weight.shape[0]
        self._norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // columns, columns, eps)
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        if gate_up.dtype != torch.float32:
            gate, up = gate_up.chunk(2, dim=-1)
            return F.silu(gate).mul_(up)
        gate_up = gate_up.contiguous()
        rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, columns)
        self._gate(gate_up.data_ptr(), out.data_ptr(), rows, columns)
        return out
