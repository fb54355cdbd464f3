"""Which source a model folder and a profile come to: the files' own format, what to round on top, what to refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from configs.schema import EngineConfig
from replicas.contract import EngineError
from replicas.engine.families import DecoderSpec, read_json
from replicas.engine.quantization import rounding
from replicas.engine.quantization.formats import format_of
from replicas.engine.quantization.gguf import GgufTensors, gguf_file
from replicas.engine.quantization.source import RoundedSource, Rounding, SafetensorsSource, WeightSource
from replicas.engine.tensors import Checkpoint

_ON_THE_FLY: dict[str, Callable[[EngineConfig], Rounding]] = {
    "int8": lambda _: rounding.to_int8,
    "w8a8": lambda _: rounding.to_w8a8,
    "int4": lambda config: partial(rounding.to_int4, group=config.quantization_group_size),
    "nf4": lambda _: rounding.to_nf4,
    "bitsandbytes": lambda _: rounding.to_nf4,
    "fp8": lambda _: rounding.to_fp8,
}


@dataclass(frozen=True, slots=True)
class OpenedSource:
    """A source, and what is quantised in it: the name of the method, empty for plain weights."""

    source: WeightSource
    method: str


def open_source(model_dir: Path, spec: DecoderSpec, config: EngineConfig, has_kernels: bool) -> OpenedSource:
    """Opens the weights of a folder. Raises EngineError naming file and key when they cannot be what is asked for."""
    source, method = _stored(model_dir, spec)
    wanted = config.quantization
    layers = None
    if method and wanted not in (None, method):
        raise EngineError(f"{model_dir} is quantised with {method}, engine.quantization asks for {wanted}")
    if not method and wanted is not None:
        if wanted not in _ON_THE_FLY:
            raise EngineError(f"{model_dir} holds plain weights, engine.quantization asks for {wanted}")
        layers, method = _ON_THE_FLY[wanted](config), wanted
    int8_ends = config.head_quantization == "int8" or (
        config.head_quantization == "auto" and bool(method) and has_kernels
    )
    if layers is None and not int8_ends:
        return OpenedSource(source, method)
    return OpenedSource(RoundedSource(source, layers, rounding.to_int8 if int8_ends else None), method)


def is_quantised(model_dir: Path, config: EngineConfig) -> bool:
    """Whether any of the weights will be. Raises EngineError as `open_source` does."""
    if config.quantization is not None or config.head_quantization == "int8" or gguf_file(model_dir) is not None:
        return True
    path = model_dir / "config.json"
    return format_of(read_json(path), str(path)) is not None


def _stored(model_dir: Path, spec: DecoderSpec) -> tuple[WeightSource, str]:
    gguf = gguf_file(model_dir)
    if gguf is not None:
        return GgufTensors(gguf, spec), "gguf"
    config = model_dir / "config.json"
    found = format_of(read_json(config), str(config))
    return SafetensorsSource(Checkpoint(model_dir), found), found.name if found else ""
