"""What `warmgate quantize` can do: a recipe turns a layer into quantised matrices, and says how they are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from replicas.engine.quantization import rounding
from replicas.engine.quantization.formats import awq as awq_format
from replicas.engine.quantization.formats import bitsandbytes, compressed_tensors
from replicas.engine.quantization.formats import gptq as gptq_format
from replicas.engine.quantization.matrix import Quantised
from replicas.engine.quantization.methods import awq, gptq, refine, smooth
from replicas.engine.quantization.methods.statistics import Statistics
from replicas.engine.quantization.methods.textbook import MODULES, STAGES, Layer, Samples

SecondLook: TypeAlias = Callable[[Quantised, Tensor, Tensor, float], Quantised]
"""(rounded, weight, Σ x xᵀ of its inputs, damping) → rounded better."""


class Recipe(Protocol):
    """`dtype`: of all that stays as it is."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def is_calibrated(self) -> bool:
        """Whether `quantise` wants samples."""
        ...

    @property
    def is_tunable(self) -> bool:
        """Whether `tuning` can follow: integer codes."""
        ...

    @property
    def group(self) -> int:
        """Columns that share a scale; -1 stands for a whole row."""
        ...

    def quantise(self, layer: Layer, samples: Samples) -> dict[str, Quantised]:
        """All linear modules of a layer, whose other tensors it may change; moves the samples on to the next layer."""
        ...

    def stored(self, matrix: Quantised) -> dict[str, Tensor]:
        """A matrix as tensors, by name within the module."""
        ...

    def settings(self) -> dict[str, Any]:
        """`quantization_config`."""
        ...


@dataclass(frozen=True, slots=True)
class Int8:
    """SmoothQuant, then int8 weights and activations. `strength`: how much of the outliers weights take over."""

    strength: float = 0.5
    group: int = field(default=-1, init=False)
    dtype: torch.dtype = field(default=torch.bfloat16, init=False)
    is_calibrated: bool = field(default=True, init=False)
    is_tunable: bool = field(default=True, init=False)

    def quantise(self, layer: Layer, samples: Samples) -> dict[str, Quantised]:
        seen = Statistics(*MODULES)
        samples.advance(layer, seen)
        smooth.smooth(layer, seen, self.strength)
        return {module: rounding.to_w8a8(layer.weight(module)) for module in MODULES}

    def stored(self, matrix: Quantised) -> dict[str, Tensor]:
        return compressed_tensors.stored_int8(matrix)

    def settings(self) -> dict[str, Any]:
        return compressed_tensors.settings_of_w8a8()


@dataclass(frozen=True, slots=True)
class Nf4:
    """NF4 by rounding alone, in blocks of 64."""

    is_double: bool = False
    group: int = field(default=rounding.NF4_BLOCK, init=False)
    dtype: torch.dtype = field(default=torch.bfloat16, init=False)
    is_calibrated: bool = field(default=False, init=False)
    is_tunable: bool = field(default=False, init=False)

    def quantise(self, layer: Layer, samples: Samples) -> dict[str, Quantised]:
        return {module: rounding.to_nf4(layer.weight(module)) for module in MODULES}

    def stored(self, matrix: Quantised) -> dict[str, Tensor]:
        return bitsandbytes.stored_nf4(matrix, self.is_double)

    def settings(self) -> dict[str, Any]:
        return bitsandbytes.settings_of_nf4(self.is_double)


@dataclass(frozen=True, slots=True)
class Gptq:
    """Errors of columns made good by those that follow. A second look loses less of the calibration's text and more of
    others' when columns are sorted, so there is none."""

    inner: gptq.GptqSettings
    dtype: torch.dtype = field(default=torch.float16, init=False)
    is_calibrated: bool = field(default=True, init=False)
    is_tunable: bool = field(default=True, init=False)

    @property
    def group(self) -> int:
        return self.inner.group

    def quantise(self, layer: Layer, samples: Samples) -> dict[str, Quantised]:
        return _rounded(layer, samples, self.inner, _as_rounded)

    def stored(self, matrix: Quantised) -> dict[str, Tensor]:
        return gptq_format.stored(matrix)

    def settings(self) -> dict[str, Any]:
        return gptq_format.settings_of(self.inner.group, self.inner.by_importance)


@dataclass(frozen=True, slots=True)
class Awq:
    """Columns scaled by their activations, rounded as GPTQ does, in the order in which they lie; then once more."""

    group: int
    dtype: torch.dtype = field(default=torch.float16, init=False)
    is_calibrated: bool = field(default=True, init=False)
    is_tunable: bool = field(default=True, init=False)

    def quantise(self, layer: Layer, samples: Samples) -> dict[str, Quantised]:
        before = Statistics(*MODULES)
        samples.run(layer, before)
        awq.scale_layer(layer, before, self.group)
        return _rounded(layer, samples, gptq.GptqSettings(self.group), refine.refined)

    def stored(self, matrix: Quantised) -> dict[str, Tensor]:
        return awq_format.stored(matrix)

    def settings(self) -> dict[str, Any]:
        return awq_format.settings_of(self.group)


def _as_rounded(matrix: Quantised, weight: Tensor, products: Tensor, damping: float) -> Quantised:
    return matrix


def _rounded(layer: Layer, samples: Samples, settings: gptq.GptqSettings, second: SecondLook) -> dict[str, Quantised]:
    """Stage after stage, each with the inputs that the rounded stages before it give."""
    found = {}
    for stage in STAGES:
        seen = Statistics(*stage)
        samples.run(layer, seen)
        for module in stage:
            weight, products = layer.weight(module), seen.of(module).products
            rough = gptq.quantise(weight, products, settings)
            found[module] = second(rough, weight, products, settings.damping)
            layer.tensors[f"{module}.weight"] = found[module].dequantised()
    samples.advance(layer)
    return found
