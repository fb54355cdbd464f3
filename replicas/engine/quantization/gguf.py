"""Models in one GGUF file, llama.cpp's format: Q4_0, Q4_1 and Q8_0 stay as they are, other types are dequantised.

    Q4_0  half d, 16 bytes            w = d (q - 8)      block of 32 columns; low halves are columns 0 to 15
    Q4_1  half d, half m, 16 bytes    w = d q + m
    Q8_0  half d, 32 int8             w = d q

Architecture `llama` stores the heads of q and k with the two halves that rotate together side by side, where Hugging
Face's files keep them apart: rows are put back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
from torch import Tensor

from replicas.contract import EngineError
from replicas.engine.families import DecoderSpec
from replicas.engine.kernels.library import Kind, Offset
from replicas.engine.quantization.formats.reading import Shape
from replicas.engine.quantization.matrix import Quantised
from replicas.engine.rope import pair_order

_BLOCK = 32
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROTATED = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
_SIDE_BY_SIDE = ("llama",)
"""Architectures whose q and k rows are stored side by side."""


class GgufTensors:
    """The tensors of a GGUF file under Hugging Face's names, rows in Hugging Face's order. Mapped, not read."""

    def __init__(self, path: Path, spec: DecoderSpec) -> None:
        self.where = str(path)
        self._head_dim = spec.head_dim
        try:
            reader = GGUFReader(path)
            field = reader.get_field("general.architecture")
            self._side_by_side = field is not None and field.contents() in _SIDE_BY_SIDE
            self._tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise EngineError(f"{path} cannot be read: {type(error).__name__}: {error}") from error

    def __contains__(self, name: str) -> bool:
        return _gguf_name(name) in self._tensors

    def get(self, name: str) -> Tensor:
        """A tensor as float32. Raises EngineError naming file and tensor."""
        stored = self._stored(name)
        values = torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32))
        return self._in_order(name, values)

    def matrix(self, module: str, shape: Shape) -> Tensor | Quantised:
        """A weight matrix, quantised where it is stored in a type that the kernels have."""
        name = f"{module}.weight"
        stored = self._stored(name)
        found = tuple(int(n) for n in reversed(stored.shape))
        if found != shape:
            raise EngineError(f"{self.where}: {stored.name} has shape {found}, config.json implies {shape}")
        read = _READERS.get(stored.tensor_type)
        if read is None:
            return self.get(name)
        blocks = torch.from_numpy(np.array(stored.data)).view(shape[0], shape[1] // _BLOCK, -1)
        matrix = read(blocks)
        order = self._rows_back(name, shape[0])
        return matrix if order is None else matrix.take(order)

    def _stored(self, name: str) -> ReaderTensor:
        found = self._tensors.get(_gguf_name(name))
        if found is None:
            raise EngineError(f"{self.where} has no tensor {_gguf_name(name)!r} ({name})")
        return found

    def _in_order(self, name: str, values: Tensor) -> Tensor:
        order = self._rows_back(name, values.shape[0])
        return values if order is None else values[order]

    def _rows_back(self, name: str, num_rows: int) -> Tensor | None:
        if not self._side_by_side or not name.endswith(_ROTATED):
            return None
        apart = torch.argsort(pair_order(self._head_dim))  # pair_order's inverse
        heads = torch.arange(num_rows).view(-1, self._head_dim)
        return heads[:, apart].flatten()


def gguf_file(model_dir: Path) -> Path | None:
    """The GGUF of a model folder that holds no safetensors; None when there is none. Raises EngineError for several."""
    if next(model_dir.glob("*.safetensors"), None) is not None:
        return None
    files = sorted(model_dir.glob("*.gguf"))
    if len(files) > 1:
        raise EngineError(f"{model_dir} holds {len(files)} GGUF files: {', '.join(file.name for file in files)}")
    return files[0] if files else None


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{kind}"
    if module.startswith("model.layers."):
        index, _, inner = module.removeprefix("model.layers.").partition(".")
        return f"blk.{index}.{_INSIDE.get(inner, inner)}.{kind}"
    return name


def _halves(blocks: Tensor, start: int) -> Tensor:
    """A half-precision number of every block: [rows, groups, bytes] → [rows, groups] float32."""
    return blocks[:, :, start : start + 2].contiguous().view(torch.float16).squeeze(-1).float()


def _nibbles(blocks: Tensor, start: int) -> Tensor:
    codes = blocks[:, :, start:]
    return torch.cat([codes & 15, codes >> 4], dim=2).flatten(1)


def _q4_0(blocks: Tensor) -> Quantised:
    return Quantised(Kind.INTEGER4, _nibbles(blocks, 2), _halves(blocks, 0), _BLOCK)


def _q4_1(blocks: Tensor) -> Quantised:
    minimum = _halves(blocks, 2)
    return Quantised(Kind.INTEGER4, _nibbles(blocks, 4), _halves(blocks, 0), _BLOCK, Offset.MINIMUM, minimum)


def _q8_0(blocks: Tensor) -> Quantised:
    codes = (blocks[:, :, 2:] ^ 128).flatten(1)
    return Quantised(Kind.INTEGER8, codes, _halves(blocks, 0), _BLOCK)


_READERS: dict[GGMLQuantizationType, Callable[[Tensor], Quantised]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q8_0: _q8_0,
}
