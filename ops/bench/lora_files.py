"""Random LoRA checkpoints in PEFT's format: what they say does not matter, only what they weigh."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from replicas.engine.families import DecoderSpec


def write_random(folder: Path, spec: DecoderSpec, rank: int, seed: int = 0, strength: float = 0.002) -> None:
    """All linear layers of a decoder, by default with values so small that the model still speaks. `strength`: the
    standard deviation of the second matrices."""
    import torch
    from safetensors.torch import save_file

    from replicas.engine.lora.layout import shapes_of

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(spec.num_layers):
        for shape in shapes_of(spec).values():
            for part in shape.parts:
                name = f"base_model.model.{part.name_in(layer)}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(rank, shape.in_features, generator=generator) * 0.02
                tensors[f"{name}.lora_B.weight"] = torch.randn(part.num_columns, rank, generator=generator) * strength
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
