"""bitsandbytes checkpoints: LLM.int8 (Dettmers et al. 2022) and 4 bits, NF4 or FP4 (QLoRA, 2023).

4 bits:  weight [rows * columns / 2, 1] uint8        two codes a byte, the first in the high half
         weight.absmax [blocks]                      float32; double quantisation: uint8 codes of nested_quant_map
         weight.quant_map [16]                       values of the codes
         weight.quant_state.bitsandbytes__nf4        JSON: blocksize, shape, nested_blocksize, nested_offset
8 bits:  weight [rows, columns] int8, SCB [rows] float32: weight = code * SCB / 127
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from replicas.contract import EngineError
from replicas.engine.kernels.library import Kind
from replicas.engine.quantization.formats.reading import (
    Factors,
    Settings,
    Shape,
    Tensors,
    checked,
    integers,
    signed_as_unsigned,
)
from replicas.engine.quantization.matrix import Quantised

_NESTED_BLOCK = 256
_STATES = ("bitsandbytes__nf4", "bitsandbytes__fp4")


@dataclass(frozen=True, slots=True)
class BitsAndBytes:
    settings: Settings
    name: str = "bitsandbytes"

    @classmethod
    def read(cls, settings: Settings) -> BitsAndBytes:
        if not settings.values.get("load_in_4bit") and not settings.values.get("load_in_8bit"):
            raise settings.error("load_in_4bit", "neither it nor load_in_8bit is true")
        return cls(settings)

    def matrix(self, tensors: Tensors, module: str, shape: Shape) -> Quantised | None:
        if f"{module}.SCB" in tensors:
            codes = checked(tensors, f"{module}.weight", shape, "config.json")
            scale = checked(tensors, f"{module}.SCB", (shape[0],), "config.json").float() / 127
            return integers(signed_as_unsigned(codes), 8, Factors(scale[:, None], None, shape[1]))
        name = f"{module}.weight"
        state = next((s for kind in _STATES if (s := f"{name}.quant_state.{kind}") in tensors), None)
        return None if state is None else _four_bits(tensors, name, shape, _state(tensors, state))


def _state(tensors: Tensors, name: str) -> dict[str, Any]:
    try:
        state = json.loads(bytes(tensors.get(name).tolist()))
        return {"blocksize": int(state["blocksize"]), **{k: v for k, v in state.items() if k != "blocksize"}}
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{tensors.where}: {name} cannot be read: {error!r}") from error


def _four_bits(tensors: Tensors, name: str, shape: Shape, state: dict[str, Any]) -> Quantised:
    rows, columns = shape
    block = state["blocksize"]
    if columns % block:
        raise EngineError(f"{tensors.where}: {name}: {columns} columns are no whole blocks of {block}")
    why = f"blocksize {block}"
    codes = checked(tensors, name, (rows * columns // 2, 1), "config.json").flatten()
    codes = torch.stack([codes >> 4, codes & 15], dim=-1).view(rows, columns)
    absmax = checked(tensors, f"{name}.absmax", (rows * columns // block,), why)
    if f"{name}.nested_absmax" in tensors:
        absmax = _nested(tensors, name, absmax, state)
    table = checked(tensors, f"{name}.quant_map", (16,), "4 bits").float()
    return Quantised(Kind.TABLE4, codes, absmax.float().view(rows, -1), block, table=table)


def _nested(tensors: Tensors, name: str, codes: Tensor, state: dict[str, Any]) -> Tensor:
    """Double quantisation: block maxima are 8-bit codes themselves, with maxima and one mean of their own."""
    table = checked(tensors, f"{name}.nested_quant_map", (256,), "double quantisation").float()
    block = int(state["nested_blocksize"])
    outer = checked(tensors, f"{name}.nested_absmax", (-(-len(codes) // block),), f"nested_blocksize {block}").float()
    return table[codes.long()] * outer.repeat_interleave(block)[: len(codes)] + float(state["nested_offset"])


def stored_nf4(matrix: Quantised, double: bool) -> dict[str, Tensor]:
    """A matrix of table codes; with `double` quantisation block maxima are 8-bit codes themselves."""
    assert matrix.table is not None
    codes = matrix.codes.view(-1, 2)
    absmax = matrix.scale.flatten()
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": matrix.group,
        "dtype": "bfloat16",
        "shape": [matrix.rows, matrix.columns],
    }
    nested: dict[str, Tensor] = {}
    if double:
        absmax, nested, more = _doubled(absmax)
        state |= more
    packed_state = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        "weight": (codes[:, 0] << 4 | codes[:, 1]).unsqueeze(1),
        "weight.absmax": absmax,
        "weight.quant_map": matrix.table,
        **nested,
        f"weight.quant_state.{_STATES[0]}": packed_state,
    }


def settings_of_nf4(double: bool) -> dict[str, Any]:
    """`quantization_config` of such a checkpoint."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }


def _doubled(absmax: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """Maxima less their mean, as codes of the dynamic map, 256 to a block."""
    offset = absmax.mean()
    blocks = F.pad(absmax - offset, (0, -len(absmax) % _NESTED_BLOCK)).view(-1, _NESTED_BLOCK)
    outer = blocks.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    table = dynamic_map()
    codes = torch.bucketize(blocks / outer[:, None], (table[1:] + table[:-1]) / 2).flatten()[: len(absmax)]
    nested = {"weight.nested_absmax": outer, "weight.nested_quant_map": table}
    more = {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(offset)}
    return codes.to(torch.uint8), nested, more


def dynamic_map() -> Tensor:
    """bitsandbytes' signed 8-bit dynamic data type (Dettmers et al. 2021): seven decades, finer the larger. [256]"""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float64)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)
