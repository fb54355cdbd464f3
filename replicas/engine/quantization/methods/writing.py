"""Quantises a model folder into another: layer by layer, shard by shard, then what describes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.schema import EngineConfig
from replicas.contract import EngineError
from replicas.engine.families import DecoderSpec, read_json, read_spec
from replicas.engine.quantization.methods.recipes import Recipe
from replicas.engine.quantization.methods.textbook import Original, Samples
from replicas.engine.quantization.methods.tuning import QuantisedLayer, Report, tuned
from replicas.engine.quantization.opening import open_source
from replicas.engine.quantization.source import EMBEDDING

_SHARD_BYTES = 2 << 30
_NOT_COPIED = (".safetensors", ".gguf", ".bin", ".index.json")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token ids of text, in sequences: for methods that look at inputs, and for `tuning` behind them; either may be
    empty."""

    quantising: Sequence[Sequence[int]] = ()
    tuning: Sequence[Sequence[int]] = ()


def use_threads(num_threads: int) -> None:
    """How many threads this process computes with."""
    torch.set_num_threads(num_threads)


@torch.no_grad()  # not inference mode: tuning goes on with the same tensors
def quantise_model(model_dir: Path, out: Path, recipe: Recipe, texts: Calibration, report: Report) -> None:
    """Writes the quantised model into `out`, which must not exist; it appears whole or not at all.

    Raises EngineError when the model is unknown, broken or quantised already, or has nothing to tune; OSError when
    `out` cannot be written.
    """
    spec = read_spec(model_dir)
    opened = open_source(model_dir, spec, EngineConfig(), has_kernels=False)
    if opened.method not in ("", "gguf"):
        raise EngineError(f"{model_dir} is quantised already, with {opened.method}")
    if texts.tuning and not recipe.is_tunable:
        raise EngineError("only integer codes can be tuned")
    _check_group(model_dir, spec, recipe)
    work = out.with_name(f".{out.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        shards = _Shards(work)
        for tensors in _tensors(Original(opened.source, spec), recipe, texts, report):
            shards.add({name: tensor.contiguous() for name, tensor in tensors.items()})
        shards.finish()
        _describe(model_dir, work, recipe)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _tensors(original: Original, recipe: Recipe, texts: Calibration, report: Report) -> Iterator[dict[str, Tensor]]:
    """Everything the checkpoint will hold, a layer at a time."""
    yield {name: original.source.get(name).to(recipe.dtype) for name in _outside(original)}
    layers: Iterable[QuantisedLayer] = _quantised(original, recipe, texts.quantising, partial(report, "layers"))
    if texts.tuning:
        layers = tuned(list(layers), original, texts.tuning, report)
    for i, layer in enumerate(layers):
        prefix = f"model.layers.{i}."
        kept = {f"{prefix}{name}": tensor.to(recipe.dtype) for name, tensor in layer.kept.items()}
        stored = {
            f"{prefix}{module}.{name}": tensor
            for module, matrix in layer.matrices.items()
            for name, tensor in recipe.stored(matrix).items()
        }
        yield kept | stored


def _quantised(
    original: Original, recipe: Recipe, sequences: Sequence[Sequence[int]], report: Callable[[int, int], None]
) -> Iterator[QuantisedLayer]:
    samples = Samples.embedded(original.source, sequences if recipe.is_calibrated else ())
    num_layers = original.spec.num_layers
    for i in range(num_layers):
        report(i, num_layers)
        layer = original.layer(i)
        yield QuantisedLayer.of(layer, recipe.quantise(layer, samples))
    report(num_layers, num_layers)


def _outside(original: Original) -> list[str]:
    modules = [EMBEDDING, "model.norm", *([original.head] if original.head else [])]
    return [f"{module}.weight" for module in modules]


def _check_group(model_dir: Path, spec: DecoderSpec, recipe: Recipe) -> None:
    """Readers of these formats want whole groups in every matrix."""
    group = recipe.group
    for columns in (spec.hidden_size, spec.num_heads * spec.head_dim, spec.intermediate_size):
        if group > 0 and columns % group:
            raise EngineError(f"{model_dir} has matrices of {columns} columns, which are no whole groups of {group}")


@dataclass(slots=True)
class _Shards:
    """Collects tensors into files of at most two GiB or one layer."""

    folder: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    files: list[tuple[Path, list[str]]] = field(default_factory=list)
    num_bytes: int = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        size = sum(t.nbytes for t in (*self.tensors.values(), *tensors.values()))
        if self.tensors and size > _SHARD_BYTES:
            self._flush()
        self.tensors |= tensors

    def finish(self) -> None:
        """Names the files as readers expect them, with an index when there are several."""
        self._flush()
        if len(self.files) == 1:
            self.files[0][0].rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, (path, names) in enumerate(self.files, 1):
            final = self.folder / f"model-{i:05}-of-{len(self.files):05}.safetensors"
            path.rename(final)
            weight_map |= dict.fromkeys(names, final.name)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _flush(self) -> None:
        path = self.folder / f"shard-{len(self.files)}.safetensors"
        save_file(self.tensors, path, metadata={"format": "pt"})
        self.num_bytes += sum(t.nbytes for t in self.tensors.values())
        self.files.append((path, list(self.tensors)))
        self.tensors = {}


def _describe(model_dir: Path, folder: Path, recipe: Recipe) -> None:
    """config.json with what was done, and copies of all that is no weights."""
    config = dict(read_json(model_dir / "config.json"))
    config.pop("torch_dtype", None)
    config |= {"dtype": str(recipe.dtype).removeprefix("torch."), "quantization_config": recipe.settings()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in model_dir.iterdir():
        if path.is_file() and path.name not in ("config.json", "manifest.json") and not path.name.endswith(_NOT_COPIED):
            shutil.copy(path, folder / path.name)
