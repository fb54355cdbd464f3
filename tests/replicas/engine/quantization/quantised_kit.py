"""Tiny models in every quantised form, and the plain folder that each of them means."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.schema import EngineConfig
from replicas.engine.families import read_spec
from replicas.engine.quantization import rounding
from replicas.engine.quantization.methods import recipes
from replicas.engine.quantization.methods.gptq import GptqSettings
from replicas.engine.quantization.methods.writing import Calibration, quantise_model
from replicas.engine.quantization.opening import open_source
from replicas.engine.quantization.source import Dequantised
from tests.replicas.engine.tiny import make_tiny, random_tokens

SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 2}
GROUP = 32
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEQUENCES = [random_tokens(32, seed) for seed in range(4)]

RECIPES: dict[str, recipes.Recipe] = {
    "int8": recipes.Int8(),
    "nf4": recipes.Nf4(),
    "nf4, doubly": recipes.Nf4(is_double=True),
    "gptq": recipes.Gptq(GptqSettings(GROUP)),
    "gptq by importance": recipes.Gptq(GptqSettings(GROUP, by_importance=True)),
    "awq": recipes.Awq(GROUP),
}
GGUF = {
    "gguf q4_0": GGMLQuantizationType.Q4_0,
    "gguf q4_1": GGMLQuantizationType.Q4_1,
    "gguf q8_0": GGMLQuantizationType.Q8_0,
}


def make_plain(family: str, folder: Path) -> Path:
    make_tiny(family, folder, **SIZES)
    return folder


def make_with(recipe: recipes.Recipe) -> Callable[[Path, Path], None]:
    return lambda plain, out: quantise_model(plain, out, recipe, Calibration(SEQUENCES), lambda *progress: None)


def make_fp8(plain: Path, out: Path, name: str = "weight_scale") -> None:
    """A compressed-tensors checkpoint with float8 weights and a scale a row."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(plain / "model.safetensors").items():
        module, _, kind = key.rpartition(".")
        if kind == "weight" and module.endswith(MODULES):
            matrix = rounding.to_fp8(tensor)
            tensors |= {key: matrix.codes, f"{module}.{name}": matrix.scale}
        else:
            tensors[key] = tensor
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "type": "float"}}
    _write(plain, out, tensors, {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}})


def make_fp8_blocks(plain: Path, out: Path) -> None:
    """A `quant_method: fp8` checkpoint, blocks of 32 by 32."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(plain / "model.safetensors").items():
        module, _, kind = key.rpartition(".")
        if kind == "weight" and module.endswith(MODULES):
            rows, columns = tensor.shape
            blocks = tensor.view(rows // 32, 32, columns // 32, 32)
            scale = blocks.abs().amax(dim=(1, 3)) / 448
            codes = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
            tensors |= {key: codes, f"{module}.weight_scale_inv": scale}
        else:
            tensors[key] = tensor
    _write(plain, out, tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]})


def make_gguf(kind: GGMLQuantizationType) -> Callable[[Path, Path], None]:
    """As llama.cpp's converter writes a llama: rows of q and k side by side, norms in float32."""

    def make(plain: Path, out: Path) -> None:
        out.mkdir()
        shutil.copy(plain / "config.json", out / "config.json")
        spec = read_spec(plain)
        writer = gguf.GGUFWriter(out / "model.gguf", "llama")
        for key, tensor in load_file(plain / "model.safetensors").items():
            values = tensor.float()
            for name, heads in (("q_proj", spec.num_heads), ("k_proj", spec.num_kv_heads)):
                if f"{name}.weight" in key:
                    values = values.view(heads, 2, spec.head_dim // 2, -1).transpose(1, 2).reshape(values.shape)
            stored = GGMLQuantizationType.F32 if values.dim() == 1 else kind
            data = gguf.quants.quantize(values.numpy(), stored)
            writer.add_tensor(_gguf_name(key), data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return make


def _gguf_name(name: str) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 16)
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def _write(plain: Path, out: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    out.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


CHECKPOINTS: dict[str, Callable[[Path, Path], None]] = {
    **{name: make_with(recipe) for name, recipe in RECIPES.items()},
    "compressed fp8": make_fp8,
    "fp8 in blocks": make_fp8_blocks,
    **{name: make_gguf(kind) for name, kind in GGUF.items()},
}

ON_THE_FLY: dict[str, dict[str, Any]] = {
    "int8": {"quantization": "int8"},
    "w8a8": {"quantization": "w8a8"},
    "int4": {"quantization": "int4", "quantization_group_size": 32},
    "int4, whole rows": {"quantization": "int4", "quantization_group_size": -1},
    "nf4": {"quantization": "nf4"},
    "bitsandbytes": {"quantization": "bitsandbytes"},
    "fp8": {"quantization": "fp8"},
    "int8 with its head": {"quantization": "int8", "head_quantization": "int8"},
}


def meant(folder: Path, plain: Path, out: Path, **settings: Any) -> Path:
    """A plain checkpoint of what a quantised one, or a plain one under `settings`, means. `plain` gives the names."""
    spec = read_spec(folder)
    source = open_source(folder, spec, EngineConfig(**settings), has_kernels=False).source
    floats = Dequantised(source, spec)
    names = load_file(plain / "model.safetensors")
    out.mkdir()
    tensors = {name: floats.get(name).float().contiguous() for name in names}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return out
