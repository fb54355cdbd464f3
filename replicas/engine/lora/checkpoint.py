"""LoRA checkpoints for one base model: everything that can be checked is checked before a value is read.

adapter_config.json ─► which modules, which rank ┐
header of the weights ─► names, shapes ──────────┴─► agree? ─► values, finite? ─► scaled, in the pool's order
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.lora import LoraConfig, LoraError, LoraFiles, lora_folder, read_lora, same_model
from replicas.contract import AdapterSpec, EngineError
from replicas.engine.families import DecoderSpec
from replicas.engine.lora.layout import Part, Shapes, Target, shapes_of
from replicas.engine.rope import pair_order

_PREFIX = "base_model.model."
_DTYPES = frozenset({"F32", "F16", "BF16", "F64"})


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What adapters must have been trained on. `names`: what this model is called here and elsewhere."""

    spec: DecoderSpec
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerMatrices:
    """One target of one layer in the pool's order: `a` [rank, num_parts, in_features], `b` of each part
    [rank, num_columns]."""

    target: Target
    layer: int
    a: Tensor
    b: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Module:
    """Where a module's matrices are, and what they are multiplied with. `rank` 0: it is not adapted."""

    name: str
    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class CheckedLora:
    """A checkpoint that fits its base model. `ranks`: the largest of each target, 0 where nothing is adapted.
    `modules`: by name."""

    files: LoraFiles
    shapes: Shapes
    spec: DecoderSpec
    ranks: Mapping[Target, int]
    modules: Mapping[str, _Module]

    @property
    def rank(self) -> int:
        """Pages that it takes."""
        return max(self.ranks.values())

    def matrices(self) -> Iterator[LayerMatrices]:
        """Reads layer after layer, in float32 and scaled. Raises EngineError for values that are no numbers."""
        path = self.files.weights
        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                for layer in range(self.spec.num_layers):
                    for target in self.shapes:
                        if self.ranks[target]:
                            yield self._matrices(opened, target, layer)
        except (OSError, SafetensorError) as error:
            raise EngineError(f"{path} cannot be read: {error}") from error

    def _matrices(self, opened: Any, target: Target, layer: int) -> LayerMatrices:
        shape, rank = self.shapes[target], self.ranks[target]
        a = torch.zeros(rank, len(shape.parts), shape.in_features)
        b = tuple(torch.zeros(rank, part.num_columns) for part in shape.parts)
        for i, part in enumerate(shape.parts):
            module = self.modules[part.name_in(layer)]
            if module.rank:
                a[: module.rank, i] = _read(opened, f"{_PREFIX}{module.name}.lora_A.weight")
                columns = _read(opened, f"{_PREFIX}{module.name}.lora_B.weight").t().contiguous() * module.scaling
                b[i][: module.rank] = self._in_order(columns, part)
        return LayerMatrices(target, layer, a, b)

    def _in_order(self, columns: Tensor, part: Part) -> Tensor:
        """The rows of B as the fused weights have theirs. columns: [rank, num_columns]."""
        if not part.is_rotated:
            return columns
        head_dim = self.spec.head_dim
        return columns.view(columns.shape[0], -1, head_dim)[:, :, pair_order(head_dim)].flatten(1)


def check_lora(adapter: AdapterSpec, base: BaseModel) -> CheckedLora:
    """Reads what a checkpoint says of itself. Raises EngineError when it cannot be served on this model."""
    if not adapter.path:
        raise EngineError("it has no path: where its weights are is not known")
    try:
        files = read_lora(lora_folder(adapter.path))
        checked = _checked(files, adapter, base)
        if adapter.digest and files.digest() != adapter.digest:
            raise LoraError(f"the files in {files.folder} have changed since it was added: give it a new version")
        return checked
    except LoraError as error:
        raise EngineError(str(error)) from error


def _checked(files: LoraFiles, adapter: AdapterSpec, base: BaseModel) -> CheckedLora:
    config, shapes = files.config, shapes_of(base.spec)
    trained_on = config.base_model
    if trained_on and not any(same_model(trained_on, name) for name in base.names):
        known = ", ".join(base.names)
        raise LoraError(f"it was trained on {trained_on!r}, which is none of the names of this model: {known}")
    modules: dict[str, _Module] = {}
    expected: dict[str, tuple[int, ...]] = {}
    ranks: dict[Target, int] = dict.fromkeys(shapes, 0)
    for target, shape in shapes.items():
        for part in shape.parts:
            for layer in range(base.spec.num_layers):
                module = modules[part.name_in(layer)] = _module(config, part, layer)
                if module.rank:
                    ranks[target] = max(ranks[target], module.rank)
                    expected[f"{_PREFIX}{module.name}.lora_A.weight"] = (module.rank, shape.in_features)
                    expected[f"{_PREFIX}{module.name}.lora_B.weight"] = (part.num_columns, module.rank)
    if not expected:
        raise LoraError(f"its target_modules name no linear layer of this model: {config.targets!r}")
    _compare(files, expected)
    if max(ranks.values()) > adapter.rank:
        raise LoraError(f"its rank is {max(ranks.values())}, it was added with rank {adapter.rank}")
    return CheckedLora(files, shapes, base.spec, ranks, modules)


def _compare(files: LoraFiles, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises LoraError unless the file has these tensors and no others."""
    unknown = sorted(files.tensors.keys() - expected.keys())
    if unknown:
        raise LoraError(f"{files.weights} has {_some(unknown)}, for which this engine has no place")
    missing = sorted(expected.keys() - files.tensors.keys())
    if missing:
        raise LoraError(f"{files.weights} lacks {_some(missing)}, which its configuration implies")
    for name, shape in expected.items():
        found = files.tensors[name]
        if found.shape != shape:
            raise LoraError(f"{name} has shape {found.shape}, configuration and base model imply {shape}")
        if found.dtype not in _DTYPES:
            raise LoraError(f"{name} has dtype {found.dtype}: there are {', '.join(sorted(_DTYPES))}")


def _module(config: LoraConfig, part: Part, layer: int) -> _Module:
    name = part.name_in(layer)
    if not config.adapts(name):
        return _Module(name, 0, 0.0)
    return _Module(name, config.rank_of(name), config.scaling_of(name))


def _read(opened: Any, name: str) -> Tensor:
    tensor: Tensor = opened.get_tensor(name).float()
    if not torch.isfinite(tensor).all():
        raise EngineError(f"{name} has values that are no finite numbers")
    return tensor


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
