"""GPTQ checkpoints (Frantar et al. 2022) as AutoGPTQ, GPTQModel and vLLM have them.

qweight [columns * bits / 32, rows] int32     words of consecutive columns
qzeros  [groups, rows * bits / 32]  int32     words of consecutive rows; one less than meant, but in `gptq_v2`
scales  [groups, rows]              float16
g_idx   [columns]                   int32     group of each column; with `desc_act` in no order
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from replicas.contract import EngineError
from replicas.engine.kernels.library import Kind
from replicas.engine.quantization.formats.bits import pack_words, unpack_words
from replicas.engine.quantization.formats.reading import Factors, Settings, Shape, Tensors, checked, group_of, integers
from replicas.engine.quantization.matrix import INTEGER_ZERO, Quantised


@dataclass(frozen=True, slots=True)
class Gptq:
    """`zero_shift`: what to add to stored zero points."""

    settings: Settings
    bits: int
    group: int
    zero_shift: int
    name: str = "gptq"

    @classmethod
    def read(cls, settings: Settings) -> Gptq:
        """Raises EngineError for settings that no reader here knows."""
        layout = settings.values.get("checkpoint_format") or "gptq"
        if layout not in ("gptq", "gptq_v2"):
            raise settings.error("checkpoint_format", f"unknown layout {layout!r}: this engine has gptq and gptq_v2")
        return cls(settings, settings.bits("bits"), settings.group("group_size"), 1 if layout == "gptq" else 0)

    def matrix(self, tensors: Tensors, module: str, shape: Shape) -> Quantised | None:
        if f"{module}.qweight" not in tensors:
            return None
        (rows, columns), (bits, given) = shape, self._of(module)
        group = group_of(given, columns)
        groups, why = -(-columns // group), f"group_size {given} at {bits} bits"
        qweight = checked(tensors, f"{module}.qweight", (columns * bits // 32, rows), why)
        qzeros = checked(tensors, f"{module}.qzeros", (groups, -(-rows * bits // 32)), why)
        scales = checked(tensors, f"{module}.scales", (groups, rows), why)
        zero = (unpack_words(qzeros, bits, 1)[:, :rows].int() + self.zero_shift) & 2**bits - 1
        matrix = integers(unpack_words(qweight, bits, 0).t().contiguous(), bits, Factors(scales.t(), zero.t(), group))
        if f"{module}.g_idx" not in tensors:
            return matrix
        index = checked(tensors, f"{module}.g_idx", (columns,), why)
        return sorted_by_group(matrix, index, f"{tensors.where}: {module}.g_idx")

    def _of(self, module: str) -> tuple[int, int]:
        """Bits and group size of a module: GPTQModel's `dynamic` rules, `+:regex` → settings of its own, come first."""
        for rule in self.settings.mapping("dynamic"):
            if not rule.startswith("-") and self.settings.matches("dynamic", rule.removeprefix("+:"), module):
                own = self.settings.mapping("dynamic", rule)
                settings = Settings(self.settings.path, {"bits": self.bits, "group_size": self.group, **own})
                return settings.bits("bits"), settings.group("group_size")
        return self.bits, self.group


def sorted_by_group(matrix: Quantised, group_index: Tensor, where: str) -> Quantised:
    """Columns brought together by group. Raises EngineError when groups are not all of the size given."""
    group_index = group_index.long()
    ordered = torch.arange(matrix.columns) // matrix.group
    if torch.equal(group_index, ordered):
        return matrix
    order = torch.argsort(group_index, stable=True)
    if not torch.equal(group_index[order], ordered):
        raise EngineError(f"{where} does not cut {matrix.columns} columns into groups of {matrix.group}")
    if len(matrix.scale[0]) == 1:
        return matrix
    return replace(matrix, codes=matrix.codes[:, order].contiguous(), order=order)


def stored(matrix: Quantised) -> dict[str, Tensor]:
    """A matrix of integers with zero points from 1 on, in the first layout."""
    bits = 4 if matrix.kind is Kind.INTEGER4 else 8
    group_index = torch.arange(matrix.columns) // matrix.group
    codes = matrix.codes
    if matrix.order is not None:
        back = torch.argsort(matrix.order)
        codes, group_index = codes[:, back], group_index[back]
    zero = torch.full_like(matrix.scale, INTEGER_ZERO[matrix.kind]) if matrix.offset is None else matrix.offset
    return {
        "qweight": pack_words(codes.t(), bits, 0),
        "qzeros": pack_words(zero.t().int() - 1, bits, 1),
        "scales": matrix.scale.t().half().contiguous(),
        "g_idx": group_index.int(),
    }


def settings_of(group: int, by_importance: bool) -> dict[str, Any]:
    """`quantization_config` of a checkpoint with 4 bits and zero points."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group,
        "desc_act": by_importance,
        "sym": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }
