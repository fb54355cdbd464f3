"""What methods learn from calibration: per linear module's input, or per stage of modules that share one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from replicas.engine.quantization.methods.textbook import STAGES

_STAGE_OF = {module: stage[0] for stage in STAGES for module in stage}


@dataclass(slots=True)
class InputStatistics:
    """Sums over all tokens of one input. products: Σ x xᵀ [columns, columns]"""

    products: Tensor
    magnitude: Tensor  # Σ |x| [columns]
    largest: Tensor  # max |x| [columns]
    num_tokens: int

    @property
    def mean_magnitude(self) -> Tensor:
        return self.magnitude / self.num_tokens


class Statistics:
    """A `Record` that keeps `InputStatistics` for the first module of each wanted stage."""

    def __init__(self, *modules: str) -> None:
        self._wanted = {_STAGE_OF[module] for module in modules}
        self._seen: dict[str, InputStatistics] = {}

    def __call__(self, module: str, x: Tensor) -> None:
        if module not in self._wanted:
            return
        products, sizes = x.T @ x, x.abs()
        seen = self._seen.get(module)
        if seen is None:
            self._seen[module] = InputStatistics(products, sizes.sum(0), sizes.amax(0), len(x))
            return
        seen.products += products
        seen.magnitude += sizes.sum(0)
        seen.largest = torch.maximum(seen.largest, sizes.amax(0))
        seen.num_tokens += len(x)

    def of(self, module: str) -> InputStatistics:
        """What went into a module."""
        return self._seen[_STAGE_OF[module]]
