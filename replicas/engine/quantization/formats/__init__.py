"""Readers of quantised checkpoints. A format is a class that reads its settings and its matrices, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from replicas.contract import EngineError
from replicas.engine.quantization.formats.awq import Awq
from replicas.engine.quantization.formats.bitsandbytes import BitsAndBytes
from replicas.engine.quantization.formats.compressed_tensors import CompressedTensors
from replicas.engine.quantization.formats.fp8 import Fp8
from replicas.engine.quantization.formats.gptq import Gptq
from replicas.engine.quantization.formats.reading import Format, Json, Settings

_READERS: dict[str, Callable[[Settings], Format]] = {
    "awq": Awq.read,
    "gptq": Gptq.read,
    "compressed-tensors": CompressedTensors.read,
    "bitsandbytes": BitsAndBytes.read,
    "fp8": Fp8.read,
}


def format_of(config: Json, path: str) -> Format | None:
    """What a config.json at `path` says of quantised weights; None when they are plain.

    Raises EngineError naming file and key for a method or a setting that this engine does not have.
    """
    key = "quantization_config" if config.get("quantization_config") else "compression_config"
    found = config.get(key)
    if not found:
        return None
    if not isinstance(found, Mapping):
        raise EngineError(f"{path}: {key}: expected an object, got {found!r}")
    method = found.get("quant_method") or ("compressed-tensors" if "config_groups" in found else None)
    if not isinstance(method, str) or method not in _READERS:
        known = ", ".join(sorted(_READERS))
        where = f"{path}: quantization_config.quant_method"
        raise EngineError(f"{where}: unknown method {method!r}: this engine has {known}")
    return _READERS[method](Settings(path, found))
