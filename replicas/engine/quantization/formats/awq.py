"""AWQ checkpoints (Lin et al. 2023) in AutoAWQ's GEMM layout, which vLLM and GPTQModel read and write too.

    qweight [columns, rows / 8] int32, qzeros [groups, rows / 8] int32, scales [groups, rows] float16

Eight rows share a word, in the order of `INTERLEAVE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from replicas.engine.quantization.formats.bits import pack_words, unpack_words
from replicas.engine.quantization.formats.reading import Factors, Settings, Shape, Tensors, checked, group_of, integers
from replicas.engine.quantization.matrix import Quantised

INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight rows each four bits of a word hold, lowest bits first."""

_BITS = 4


@dataclass(frozen=True, slots=True)
class Awq:
    settings: Settings
    group: int
    name: str = "awq"

    @classmethod
    def read(cls, settings: Settings) -> Awq:
        """Raises EngineError for settings that no reader here knows."""
        version = str(settings.values.get("version") or "gemm").lower()
        if version != "gemm":
            raise settings.error("version", f"unknown layout {version!r}: this engine has gemm")
        bits = settings.bits("bits", "w_bit")
        if bits != _BITS:
            raise settings.error("bits", f"{bits} bits are unknown: AWQ has {_BITS}")
        return cls(settings, settings.group("group_size", "q_group_size"))

    def matrix(self, tensors: Tensors, module: str, shape: Shape) -> Quantised | None:
        if f"{module}.qweight" not in tensors:
            return None
        rows, columns = shape
        group = group_of(self.group, columns)
        groups, why = -(-columns // group), f"group_size {self.group}"
        qweight = checked(tensors, f"{module}.qweight", (columns, rows // 8), why)
        scales = checked(tensors, f"{module}.scales", (groups, rows), why)
        zero = None
        if self.settings.values.get("zero_point", True):
            zero = unpack(checked(tensors, f"{module}.qzeros", (groups, rows // 8), why)).t()
        return integers(unpack(qweight).t().contiguous(), _BITS, Factors(scales.t(), zero, group))


def unpack(words: Tensor) -> Tensor:
    """[n, rows / 8] int32 → [n, rows] uint8."""
    codes = unpack_words(words, _BITS, 1).view(len(words), -1, 8)
    return torch.empty_like(codes).index_copy_(2, torch.tensor(INTERLEAVE), codes).flatten(1)


def pack(codes: Tensor) -> Tensor:
    """[n, rows] → [n, rows / 8] int32. rows: a multiple of 8"""
    return pack_words(codes.reshape(len(codes), -1, 8)[..., list(INTERLEAVE)].flatten(1), _BITS, 1)


def stored(matrix: Quantised) -> dict[str, Tensor]:
    """A matrix of 4-bit integers with zero points; rows a multiple of 8."""
    assert matrix.offset is not None and matrix.order is None
    return {
        "qweight": pack(matrix.codes.t()),
        "qzeros": pack(matrix.offset.t().to(torch.uint8)),
        "scales": matrix.scale.t().half().contiguous(),
    }


def settings_of(group: int) -> dict[str, Any]:
    """`quantization_config` of such a checkpoint."""
    return {
        "quant_method": "awq",
        "bits": _BITS,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
