"""`quant_method: fp8` checkpoints: one scale a matrix (AutoFP8), a row, or a block of 128 by 128 (DeepSeek, Qwen3).

Activations keep their precision: rounding them to fp8 as well buys speed on processors with fp8 products only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from replicas.contract import EngineError
from replicas.engine.quantization.formats.reading import Settings, Shape, Tensors, checked
from replicas.engine.quantization.matrix import FLOAT8, Quantised


@dataclass(frozen=True, slots=True)
class Fp8:
    """`block`: rows and columns that share a scale; None when a matrix or a row does."""

    settings: Settings
    block: tuple[int, int] | None
    name: str = "fp8"

    @classmethod
    def read(cls, settings: Settings) -> Fp8:
        block = settings.values.get("weight_block_size")
        if block is None:
            return cls(settings, None)
        if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
            raise settings.error("weight_block_size", f"expected two positive numbers, got {block!r}")
        return cls(settings, (block[0], block[1]))

    def matrix(self, tensors: Tensors, module: str, shape: Shape) -> Quantised | None:
        names = [f"{module}.{name}" for name in ("weight_scale_inv", "weight_scale")]
        name = next((name for name in names if name in tensors), None)
        if name is None:
            return None
        codes = checked(tensors, f"{module}.weight", shape, "config.json")
        if codes.dtype not in FLOAT8:
            raise EngineError(f"{tensors.where}: {module}.weight is {codes.dtype}: expected float8")
        scale, group = self._scale(tensors, name, shape)
        return Quantised(FLOAT8[codes.dtype], codes, scale.float().contiguous(), group)

    def _scale(self, tensors: Tensors, name: str, shape: Shape) -> tuple[Tensor, int]:
        rows, columns = shape
        if self.block is not None:
            down, across = self.block
            stored = (-(-rows // down), -(-columns // across))
            blocks = checked(tensors, name, stored, f"weight_block_size {list(self.block)}")
            return blocks.repeat_interleave(down, dim=0)[:rows], across
        scale = tensors.get(name)
        if scale.numel() not in (1, rows):
            raise EngineError(f"{tensors.where}: {name} has {scale.numel()} values for {rows} rows")
        return scale.reshape(-1, 1).expand(rows, 1), columns
