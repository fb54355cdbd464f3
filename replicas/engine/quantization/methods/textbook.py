"""The decoder layer by layer in float32, as calibration sees it: weights by name, inputs of linear modules recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from replicas.engine.families import DecoderSpec
from replicas.engine.quantization.source import EMBEDDING, HEAD, WeightSource
from replicas.engine.rope import rope_table
from replicas.engine.self_check import hidden_keys, turned

Record: TypeAlias = Callable[[str, Tensor], None]
"""(module's name within the layer, its input [num_tokens, columns])."""

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTPUT = "self_attn.o_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"
STAGES = (QKV, (OUTPUT,), GATE_UP, (DOWN,))
"""The linear modules of a layer, those with the same input together, in the order of computation."""

MODULES = tuple(module for stage in STAGES for module in stage)
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"


Rounding: TypeAlias = Callable[[str, Tensor], Tensor]
"""(module's name, its input) → what it multiplies."""


def exact(module: str, x: Tensor) -> Tensor:
    """A `Rounding` that changes nothing."""
    return x


def forget(module: str, x: Tensor) -> None:
    """A `Record` that keeps nothing."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's tensors by name within the layer (`self_attn.q_proj.weight`), float32; methods may change them."""

    index: int
    spec: DecoderSpec
    tensors: dict[str, Tensor]
    rounding: Rounding = exact

    @classmethod
    def read(cls, source: WeightSource, spec: DecoderSpec, index: int) -> Layer:
        """Copies of all tensors of a layer."""
        prefix = f"model.layers.{index}."
        names = [f"{name}.weight" for name in (*MODULES, ATTENTION_NORM, MLP_NORM)]
        names += [f"{name}.bias" for name in MODULES if f"{prefix}{name}.bias" in source]
        if spec.qk_norm:
            names += [f"self_attn.{name}.weight" for name in ("q_norm", "k_norm")]
        return cls(index, spec, {name: source.get(prefix + name).float().clone() for name in names})

    def forward(self, x: Tensor, record: Record) -> Tensor:
        """One sequence through the layer. [num_tokens, hidden] → the same shape."""
        spec = self.spec
        h = self._norm(x, ATTENTION_NORM)
        q, k, v = (self._linear(h, name, record).view(len(x), -1, spec.head_dim).transpose(0, 1) for name in QKV)
        if spec.qk_norm:
            q, k = self._norm(q, "self_attn.q_norm"), self._norm(k, "self_attn.k_norm")
        turns = rope_table(spec.rope, spec.head_dim, len(x))
        q, k = turned(q, turns), turned(k, turns)
        k, v = (kv.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=0) for kv in (k, v))
        scores = q @ k.transpose(1, 2) / spec.head_dim**0.5
        scores = scores.masked_fill(hidden_keys(len(x), spec.windows[self.index]), float("-inf"))
        attended = (torch.softmax(scores, dim=-1) @ v).transpose(0, 1).flatten(1)
        x = x + self._linear(attended, OUTPUT, record)
        h = self._norm(x, MLP_NORM)
        gate, up = (self._linear(h, name, record) for name in GATE_UP)
        return x + self._linear(F.silu(gate) * up, DOWN, record)

    def weight(self, module: str) -> Tensor:
        return self.tensors[f"{module}.weight"]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight(name), self.spec.rms_norm_eps)

    def _linear(self, x: Tensor, module: str, record: Record) -> Tensor:
        record(module, x)
        return F.linear(self.rounding(module, x), self.weight(module), self.tensors.get(f"{module}.bias"))


@dataclass(frozen=True, slots=True)
class Original:
    """A model that is to be quantised."""

    source: WeightSource
    spec: DecoderSpec

    @property
    def head(self) -> str | None:
        """The head's module; None when it is the embedding."""
        tied = self.spec.tied_embeddings or f"{HEAD}.weight" not in self.source
        return None if tied else HEAD

    def layer(self, index: int) -> Layer:
        """A copy of a layer."""
        return Layer.read(self.source, self.spec, index)


@dataclass(slots=True)
class Samples:
    """Calibration sequences on their way through the layers. hidden: [num_tokens, hidden] each."""

    hidden: list[Tensor]

    @classmethod
    def embedded(cls, source: WeightSource, sequences: Sequence[Sequence[int]]) -> Samples:
        table = source.get(f"{EMBEDDING}.weight")
        return cls([table[list(tokens)].float() for tokens in sequences])

    def run(self, layer: Layer, record: Record) -> None:
        """Through a layer, results forgotten."""
        for x in self.hidden:
            layer.forward(x, record)

    def advance(self, layer: Layer, record: Record = forget) -> None:
        """Through a layer, on to the next."""
        self.hidden = [layer.forward(x, record) for x in self.hidden]
