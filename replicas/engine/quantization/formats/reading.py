"""What readers of quantised checkpoints share: a protocol, checked tensors, matrices of integers with zero points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import regex
import torch
from torch import Tensor

from replicas.contract import EngineError
from replicas.engine.kernels.library import Kind, Offset
from replicas.engine.quantization.matrix import INTEGER_ZERO, Quantised

Json: TypeAlias = Mapping[str, Any]
Shape: TypeAlias = tuple[int, int]
"""(rows, columns) of a weight matrix: outputs, inputs."""

_PATTERN_S = 0.2
"""A pattern that a checkpoint brings may not take longer than this over one name."""

_KINDS = {4: Kind.INTEGER4, 8: Kind.INTEGER8}


class Tensors(Protocol):
    """The tensors of a checkpoint by name. `where` names it in errors."""

    @property
    def where(self) -> str: ...

    def get(self, name: str) -> Tensor: ...

    def __contains__(self, name: str) -> bool: ...


class Format(Protocol):
    """How a checkpoint stores quantised matrices."""

    @property
    def name(self) -> str:
        """What `quant_method` calls it."""
        ...

    def matrix(self, tensors: Tensors, module: str, shape: Shape) -> Quantised | None:
        """The weight of a linear module; None when the checkpoint holds it unquantised. Raises EngineError."""
        ...


@dataclass(frozen=True, slots=True)
class Settings:
    """`quantization_config` of a config.json, whose path is `path`."""

    path: str
    values: Json

    def integer(self, *names: str) -> int:
        """A whole number by the first name there is. Raises EngineError naming file and key."""
        for name in names:
            value = self.values.get(name)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int):
                    raise self.error(name, f"expected a whole number, got {value!r}")
                return value
        raise self.error(names[0], "is missing")

    def bits(self, *names: str) -> int:
        """4 or 8."""
        bits = self.integer(*names)
        if bits not in _KINDS:
            raise self.error(names[0], f"{bits} bits are unknown: this engine has {sorted(_KINDS)}")
        return bits

    def group(self, *names: str) -> int:
        """Columns a group; -1 stands for a whole row."""
        size = self.integer(*names)
        if size != -1 and size < 1:
            raise self.error(names[0], f"expected -1 or a positive number, got {size}")
        return size

    def mapping(self, *keys: str) -> Json:
        """The object under keys within one another, empty where there is none. Raises EngineError for anything else."""
        found: Any = self.values
        for depth, key in enumerate(keys, 1):
            found = found.get(key)
            if found is None:
                return {}
            if not isinstance(found, Mapping):
                raise self.error(".".join(keys[:depth]), f"expected an object, got {found!r}")
        return cast("Json", found)

    def matches(self, key: str, pattern: str, name: str) -> bool:
        """Whether a name begins with a checkpoint's pattern: bounded in time, whatever the pattern."""
        try:
            return regex.match(pattern, name, timeout=_PATTERN_S) is not None
        except regex.error as error:
            raise self.error(key, f"{pattern!r} is no pattern: {error}") from error
        except TimeoutError as error:
            raise self.error(key, f"the pattern {pattern!r} takes too long over {name!r}") from error

    def error(self, key: str, reason: str) -> EngineError:
        return EngineError(f"{self.path}: quantization_config.{key}: {reason}")


def checked(tensors: Tensors, name: str, shape: tuple[int, ...], why: str) -> Tensor:
    """A tensor of that shape. Raises EngineError naming file, tensor and why the shape is expected."""
    tensor = tensors.get(name)
    if tuple(tensor.shape) != shape:
        raise EngineError(f"{tensors.where}: {name} has shape {tuple(tensor.shape)}, {why} implies {shape}")
    return tensor


def group_of(group: int, columns: int) -> int:
    """The group size itself, a row's length for -1."""
    return columns if group == -1 else group


@dataclass(frozen=True, slots=True)
class Factors:
    """Scales and zero points of a matrix, [rows, groups]. A zero point is in the codes' units."""

    scale: Tensor
    zero: Tensor | None
    group: int


def integers(codes: Tensor, bits: int, factors: Factors) -> Quantised:
    """Unsigned codes with their factors; zero points that are all in the middle are no offsets."""
    kind, zero = _KINDS[bits], factors.zero
    scale = factors.scale.float().contiguous()
    if zero is None or bool((zero == INTEGER_ZERO[kind]).all()):
        return Quantised(kind, codes, scale, factors.group)
    return Quantised(kind, codes, scale, factors.group, Offset.ZERO, zero.float().contiguous())


def signed_as_unsigned(codes: Tensor) -> Tensor:
    """int8 → uint8, 128 more."""
    return codes.view(torch.uint8) ^ 128
