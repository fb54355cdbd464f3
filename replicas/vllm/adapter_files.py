"""A LoRA checkpoint looked at before vLLM loads it: what would be refused late, or served wrong, ends here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from configs.lora import LoraError, LoraFiles, lora_folder, read_lora
from replicas.contract import AdapterSpec, EngineError

_EXPONENTS = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
"""A number whose exponent is all ones is infinite, or no number."""


def look_at(adapter: AdapterSpec, max_rank: int) -> Path:
    """The adapter's folder, sound. Reads the whole file. Raises EngineError."""
    try:
        files = read_lora(lora_folder(adapter.path))
        if files.config.max_rank > max_rank:
            raise EngineError(f"{adapter.adapter_id} has rank {files.config.max_rank}, this engine takes {max_rank}")
        if adapter.digest and files.digest() != adapter.digest:
            reason = "its files are not those that were added: give other weights another version"
            raise EngineError(f"{adapter.adapter_id}: {reason}")
        bad = next(_not_finite(files), None)
    except (LoraError, OSError, ValueError) as error:
        raise EngineError(f"vLLM could not load adapter {adapter.adapter_id}: {error}") from error
    if bad is not None:
        raise EngineError(f"{files.weights}: {bad} holds NaN or infinity")
    return files.folder


def _not_finite(files: LoraFiles) -> Iterator[str]:
    """Names of tensors with values that are no numbers."""
    with files.weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(files.weights, dtype=np.uint8, mode="r", offset=8 + length) if len(header) > 1 else np.empty(0)
    for name, about in header.items():
        kind = _EXPONENTS.get(about.get("dtype", "")) if name != "__metadata__" else None
        if kind is not None:
            start, end = about["data_offsets"]
            values = np.frombuffer(data[start:end].tobytes(), dtype=kind[0])
            if ((values & kind[1]) == kind[1]).any():
                yield name
