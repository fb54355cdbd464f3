"""Which low-rank products a decoder has, and how their results lie beside one another in its fused products.

target   | part (a module of the checkpoint), columns of the fused output
qkv      | q_proj, heads in pair order | k_proj, likewise | v_proj
output   | o_proj
gate_up  | gate_proj | up_proj
down     | down_proj
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from replicas.engine.families import DecoderSpec
from replicas.engine.model import Product

Target: TypeAlias = Product
"""A product that an adapter may add to."""


@dataclass(frozen=True, slots=True)
class Part:
    """One module: B A x goes to `columns` of the fused output. `is_rotated`: its heads are in `rope.pair_order`."""

    module: str
    columns: slice
    is_rotated: bool = False

    @property
    def num_columns(self) -> int:
        width: int = self.columns.stop - self.columns.start
        return width

    def name_in(self, layer: int) -> str:
        """The module's full name."""
        return f"model.layers.{layer}.{self.module}"


@dataclass(frozen=True, slots=True)
class TargetShape:
    """One fused product: its parts have the same input."""

    in_features: int
    parts: tuple[Part, ...]

    @property
    def out_features(self) -> int:
        return sum(part.num_columns for part in self.parts)

    @property
    def values_per_rank(self) -> int:
        """Numbers of one row of A for each part, and one column of B."""
        return len(self.parts) * self.in_features + self.out_features


Shapes: TypeAlias = dict[Target, TargetShape]


def shapes_of(spec: DecoderSpec) -> Shapes:
    """The four targets of a decoder's layer."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    hidden, inner = spec.hidden_size, spec.intermediate_size
    attention, mlp = "self_attn", "mlp"
    return {
        "qkv": _shape(
            hidden, (f"{attention}.q_proj", q, True), (f"{attention}.k_proj", kv, True), (f"{attention}.v_proj", kv)
        ),
        "output": _shape(q, (f"{attention}.o_proj", hidden)),
        "gate_up": _shape(hidden, (f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner)),
        "down": _shape(inner, (f"{mlp}.down_proj", hidden)),
    }


def _shape(in_features: int, *parts: tuple[str, int] | tuple[str, int, bool]) -> TargetShape:
    made: list[Part] = []
    for module, width, *rotated in parts:
        start = made[-1].columns.stop if made else 0
        made.append(Part(module, slice(start, start + width), any(rotated)))
    return TargetShape(in_features, tuple(made))
