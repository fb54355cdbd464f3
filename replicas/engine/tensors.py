"""Tensors from safetensors files, mapped into memory: one is read when asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from replicas.contract import EngineError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Checkpoint:
    """The tensors of a model folder by name. Files stay mapped as long as the checkpoint lives."""

    def __init__(self, model_dir: Path) -> None:
        self.where = str(model_dir)
        self._file_of = _index(model_dir)
        self._open: dict[Path, Any] = {}

    def get(self, name: str) -> Tensor:
        """A tensor as stored, its pages still on disk. Raises EngineError naming what is missing or broken."""
        path = self._file_of.get(name)
        if path is None:
            raise EngineError(f"the checkpoint {self.where} has no tensor {name!r}")
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            tensor: Tensor = self._open[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise EngineError(f"{path} cannot be read: {error}") from error
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def matrix(self, module: str, shape: tuple[int, int]) -> Tensor:
        """A module's plain weight. Raises EngineError when its shape is another."""
        name = f"{module}.weight"
        tensor = self.get(name)
        if tuple(tensor.shape) != shape:
            raise EngineError(f"{name} has shape {tuple(tensor.shape)}, config.json implies {shape}")
        return tensor


def _index(model_dir: Path) -> dict[str, Path]:
    index = model_dir / _INDEX
    try:
        if index.is_file():
            names: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return {name: model_dir / file for name, file in names.items()}
        files = [model_dir / _SINGLE] if (model_dir / _SINGLE).is_file() else sorted(model_dir.glob("*.safetensors"))
        if not files:
            raise EngineError(f"{model_dir} holds no *.safetensors")
        found: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                found.update(dict.fromkeys(opened.keys(), file))
        return found
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise EngineError(f"the weights in {model_dir} cannot be read: {type(error).__name__}: {error}") from error
