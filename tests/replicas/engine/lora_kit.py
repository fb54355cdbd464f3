"""Random LoRA checkpoints in PEFT's format, and models with their weights merged by the formula W + scaling · B A."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from replicas.contract import AdapterSpec

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEAR = (*ATTENTION, *MLP)


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk, and what it adds to each module of the base model."""

    path: Path
    rank: int
    deltas: Mapping[str, Tensor] = field(repr=False)

    def spec(self, name: str = "a@1") -> AdapterSpec:
        return AdapterSpec(adapter_id=name, path=str(self.path), rank=self.rank)

    def merged(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of the base model that has become this adapter."""
        merged = copy.deepcopy(model)
        modules = dict(merged.named_modules())
        with torch.no_grad():
            for name, delta in self.deltas.items():
                weight = modules[name].weight
                assert isinstance(weight, Tensor)
                weight += delta
        return merged


def write_adapter(
    folder: Path, model: PreTrainedModel, rank: int = 8, modules: Sequence[str] = LINEAR, **config: Any
) -> Written:
    """Random matrices, large enough to change what a tiny model says. `config` goes into adapter_config.json; `seed`,
    `layers` and `dtype` are taken out of it."""
    generator = torch.Generator().manual_seed(config.pop("seed", rank))
    layers = config.pop("layers", None)
    dtype = config.pop("dtype", torch.float32)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules), **config}
    if layers is not None:
        settings["layers_to_transform"] = layers
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        weight = getattr(module, "weight", None)
        if last not in modules or not isinstance(weight, Tensor):
            continue
        if layers is not None and int(name.split(".")[2]) not in layers:
            continue
        own_rank = settings.get("rank_pattern", {}).get(last, rank)
        alpha = settings.get("alpha_pattern", {}).get(last, settings["lora_alpha"])
        scaling = alpha / (math.sqrt(own_rank) if settings.get("use_rslora") else own_rank)
        out_features, in_features = weight.shape
        a = torch.randn(own_rank, in_features, generator=generator) / math.sqrt(in_features)
        b = torch.randn(out_features, own_rank, generator=generator) * 0.3 / math.sqrt(own_rank) / scaling
        a, b = a.to(dtype), b.to(dtype)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        deltas[name] = scaling * (b.float() @ a.float())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    largest = max([rank, *settings.get("rank_pattern", {}).values()])
    return Written(folder, largest, deltas)
