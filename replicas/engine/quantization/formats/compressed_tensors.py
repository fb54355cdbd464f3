"""compressed-tensors checkpoints, as llm-compressor writes and vLLM reads them: int8 (W8A8), fp8, packed integers.

weight        [rows, columns]  int8 or float8_e4m3fn           naive, int and float formats
weight_packed [rows, columns * bits / 32] int32                packed formats; codes are 2^(bits-1) more than meant
weight_scale  [rows, groups], [rows, 1], [1] or blocks         weight_zero_point as it, packed along rows
input_scale   [1]                                              of activations with a fixed scale
weight_g_idx  [columns]                                        group of each column
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from replicas.contract import EngineError
from replicas.engine.quantization.formats.bits import unpack_words
from replicas.engine.quantization.formats.gptq import sorted_by_group
from replicas.engine.quantization.formats.reading import (
    Factors,
    Settings,
    Shape,
    Tensors,
    checked,
    integers,
    signed_as_unsigned,
)
from replicas.engine.quantization.matrix import FLOAT8, Quantised


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    settings: Settings
    name: str = "compressed-tensors"

    @classmethod
    def read(cls, settings: Settings) -> CompressedTensors:
        """Raises EngineError for settings that are none."""
        groups = settings.mapping("config_groups")
        if not groups:
            raise settings.error("config_groups", "is missing")
        for key, scheme in groups.items():
            where = f"config_groups.{key}"
            if not isinstance(scheme, Mapping):
                raise settings.error(where, f"expected an object, got {scheme!r}")
            targets = scheme.get("targets") or []
            if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
                raise settings.error(f"{where}.targets", f"expected names in a list, got {targets!r}")
            for part in ("weights", "input_activations"):
                settings.mapping("config_groups", key, part)
        return cls(settings)

    def matrix(self, tensors: Tensors, module: str, shape: Shape) -> Quantised | None:
        packed = f"{module}.weight_packed" in tensors
        if not packed and f"{module}.weight_scale" not in tensors:
            return None
        key = self._scheme(module)
        weights = self.settings.mapping("config_groups", key, "weights")
        matrix = self._packed(tensors, module, shape, key) if packed else _whole(tensors, module, shape, weights)
        if f"{module}.weight_g_idx" in tensors:
            index = checked(tensors, f"{module}.weight_g_idx", (shape[1],), "config.json")
            matrix = sorted_by_group(matrix, index, f"{tensors.where}: {module}.weight_g_idx")
        return self._with_activations(matrix, tensors, module, key)

    def _scheme(self, module: str) -> str:
        """The key of the first config group whose targets name the module or all linear ones."""
        for key, scheme in self.settings.mapping("config_groups").items():
            if any(self._targets(key, target, module) for target in scheme.get("targets") or ()):
                return key
        raise self.settings.error("config_groups", f"no group is for {module}, which is quantised")

    def _targets(self, key: str, target: str, module: str) -> bool:
        if target.startswith("re:"):
            return self.settings.matches(f"config_groups.{key}.targets", target.removeprefix("re:"), module)
        return target in ("Linear", module)

    def _weights(self, key: str) -> Settings:
        scheme = self.settings.mapping("config_groups", key, "weights")
        return Settings(self.settings.path, {f"config_groups.{key}.weights.{k}": v for k, v in scheme.items()})

    def _packed(self, tensors: Tensors, module: str, shape: Shape, key: str) -> Quantised:
        rows, columns = shape
        settings, prefix = self._weights(key), f"config_groups.{key}.weights"
        bits = settings.bits(f"{prefix}.num_bits")
        if settings.values.get(f"{prefix}.type", "int") != "int":
            raise settings.error(f"{prefix}.type", "packed floats are unknown: this engine has packed integers")
        words = checked(tensors, f"{module}.weight_packed", (rows, -(-columns * bits // 32)), f"num_bits {bits}")
        scale, group = _scale(tensors, module, shape, settings.values.get(f"{prefix}.group_size"))
        zero = None
        if f"{module}.weight_zero_point" in tensors:
            stored = (-(-rows * bits // 32), scale.shape[1])
            packed_zero = checked(tensors, f"{module}.weight_zero_point", stored, f"num_bits {bits}")
            zero = unpack_words(packed_zero, bits, 0)[:rows]
        return integers(unpack_words(words, bits, 1)[:, :columns].contiguous(), bits, Factors(scale, zero, group))

    def _with_activations(self, matrix: Quantised, tensors: Tensors, module: str, key: str) -> Quantised:
        """With int8 weights inputs are rounded to 8 bits as asked; with fp8 weights they stay as they are."""
        inputs = self.settings.mapping("config_groups", key, "input_activations")
        if inputs.get("type") != "int":
            return matrix
        where = f"config_groups.{key}.input_activations"
        if inputs.get("num_bits") != 8 or not inputs.get("symmetric", True):
            raise self.settings.error(where, "unknown activations: this engine has symmetric ones of 8 bits")
        if matrix.codes.dtype != torch.uint8 or matrix.scale.shape[1] != 1 or matrix.offset is not None:
            raise self.settings.error(where, f"8-bit activations need symmetric weights of one scale a row: {module}")
        fixed = 0.0
        if not inputs.get("dynamic", True):
            fixed = float(tensors.get(f"{module}.input_scale").item())
        return replace(matrix, activation_bits=8, activation_scale=fixed)


def _whole(tensors: Tensors, module: str, shape: Shape, weights: Mapping[str, object]) -> Quantised:
    codes = checked(tensors, f"{module}.weight", shape, "config.json")
    scale, group = _scale(tensors, module, shape, weights.get("group_size"))
    if codes.dtype in FLOAT8:
        return Quantised(FLOAT8[codes.dtype], codes, scale.float(), group)
    if codes.dtype != torch.int8:
        raise EngineError(f"{tensors.where}: {module}.weight is {codes.dtype}: this engine has int8 and float8")
    zero = None
    if f"{module}.weight_zero_point" in tensors:
        zero = tensors.get(f"{module}.weight_zero_point").int().view(scale.shape[0], -1).expand_as(scale) + 128
    return integers(signed_as_unsigned(codes), 8, Factors(scale, zero, group))


def _scale(tensors: Tensors, module: str, shape: Shape, group_size: object) -> tuple[Tensor, int]:
    """Scales as [rows, groups], and the group's size. They may be stored by tensor, by row, by group or by block."""
    (rows, columns), name = shape, f"{module}.weight_scale"
    stored = tensors.get(name)
    if stored.numel() == 1:
        return stored.reshape(1, 1).expand(rows, 1), columns
    if stored.numel() == rows:
        return stored.reshape(rows, 1), columns
    if stored.dim() == 2 and stored.shape[0] == rows and isinstance(group_size, int) and group_size > 0:
        return checked(tensors, name, (rows, -(-columns // group_size)), f"group_size {group_size}"), group_size
    raise EngineError(f"{tensors.where}: {name} has shape {tuple(stored.shape)} for a weight of {shape}, {group_size=}")


def stored_int8(matrix: Quantised) -> dict[str, Tensor]:
    """A symmetric int8 matrix with a scale a row, as `int-quantized` has it."""
    return {"weight": (matrix.codes ^ 128).view(torch.int8), "weight_scale": matrix.scale}


def settings_of_w8a8() -> dict[str, Any]:
    """`quantization_config` of such a checkpoint with dynamic int8 activations, a scale a token."""
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "strategy": "channel", "dynamic": False},
                "input_activations": {**common, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head"],
    }
