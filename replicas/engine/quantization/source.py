"""Where a decoder's weights come from: plain or quantised safetensors, a GGUF, and rounding on the fly over either.

A loader asks for matrices by module and for all else by tensor; the self-check asks for everything by tensor, and gets
what the matrices mean as floats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from replicas.engine.families import DecoderSpec
from replicas.engine.quantization.formats.reading import Format, Shape, Tensors, checked
from replicas.engine.quantization.matrix import Quantised, rounded_inputs

Rounding: TypeAlias = Callable[[Tensor], Quantised]

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class WeightSource(Protocol):
    """The weights of one model, by Hugging Face's names. All methods raise EngineError naming file and tensor."""

    def get(self, name: str) -> Tensor:
        """A tensor that is no quantised matrix, as stored."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def matrix(self, module: str, shape: Shape) -> Tensor | Quantised:
        """The weight of a linear module or of the embedding, [rows, columns] = `shape`."""
        ...


@dataclass(frozen=True, slots=True)
class SafetensorsSource:
    """A checkpoint, of whose matrices `format` reads those that it knows; the others are plain."""

    tensors: Tensors
    format: Format | None

    def get(self, name: str) -> Tensor:
        return self.tensors.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def matrix(self, module: str, shape: Shape) -> Tensor | Quantised:
        found = None if self.format is None else self.format.matrix(self.tensors, module, shape)
        return checked(self.tensors, f"{module}.weight", shape, "config.json") if found is None else found


@dataclass(frozen=True, slots=True)
class RoundedSource:
    """Another source, its plain matrices rounded: `layers` those of the decoder's layers, `ends` head and embedding."""

    source: WeightSource
    layers: Rounding | None
    ends: Rounding | None

    def get(self, name: str) -> Tensor:
        return self.source.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self.source

    def matrix(self, module: str, shape: Shape) -> Tensor | Quantised:
        found = self.source.matrix(module, shape)
        rounding = self.ends if module in (EMBEDDING, HEAD) else self.layers
        return found if rounding is None or isinstance(found, Quantised) else rounding(found)


@dataclass(frozen=True, slots=True)
class Dequantised:
    """A source whose quantised matrices are floats again: what a reference computes with."""

    source: WeightSource
    spec: DecoderSpec

    def __contains__(self, name: str) -> bool:
        return name in self.source

    def get(self, name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        shape = _shapes(self.spec).get(module.rpartition(".")[2]) if kind == "weight" else None
        if shape is None:
            return self.source.get(name)
        found = self.source.matrix(module, shape)
        return found.dequantised() if isinstance(found, Quantised) else found

    def inputs(self, module: str, x: Tensor) -> Tensor:
        """A linear module's input, rounded if the module rounds it. x: [num_tokens, columns]"""
        found = self.source.matrix(module, _shapes(self.spec)[module.rpartition(".")[2]])
        return rounded_inputs(x, found) if isinstance(found, Quantised) else x


def _shapes(spec: DecoderSpec) -> dict[str, Shape]:
    """Shapes of all matrices, by the last part of the module's name."""
    hidden, inner, vocab = spec.hidden_size, spec.intermediate_size, spec.vocab_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return {
        "embed_tokens": (vocab, hidden),
        "lm_head": (vocab, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
