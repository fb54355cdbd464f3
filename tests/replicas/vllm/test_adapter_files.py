"""What is wrong with a LoRA checkpoint is found before vLLM sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs.lora import read_lora
from replicas.contract import AdapterSpec, EngineError
from replicas.vllm.adapter_files import look_at


def written(folder: Path, rank: int = 4, dtype: torch.dtype = torch.float32, value: float = 0.5) -> AdapterSpec:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.lora_A.weight": torch.full((rank, 8), 0.5, dtype=dtype),
        f"{name}.lora_B.weight": torch.full((8, rank), value, dtype=dtype),
    }
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return AdapterSpec(adapter_id="a@1", path=str(folder), rank=rank, digest=read_lora(folder).digest())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_no_numbers_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    assert look_at(written(tmp_path / "good", dtype=dtype, value=-60000.0), 4) == tmp_path / "good"
    for name, value in (("nan", float("nan")), ("inf", float("-inf"))):
        with pytest.raises(EngineError, match=r"q_proj\.lora_B\.weight holds NaN or infinity"):
            look_at(written(tmp_path / name, dtype=dtype, value=value), 4)


def test_ranks_beyond_the_engines_and_other_files_than_were_added_are_refused(tmp_path: Path) -> None:
    spec = written(tmp_path / "a", rank=8)
    with pytest.raises(EngineError, match="a@1 has rank 8, this engine takes 4"):
        look_at(spec, 4)
    written(tmp_path / "a", rank=8, value=0.25)
    with pytest.raises(EngineError, match="not those that were added"):
        look_at(spec, 8)


def test_what_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="could not load adapter a@1"):
        look_at(AdapterSpec(adapter_id="a@1", path=str(tmp_path / "nowhere")), 4)
    spec = written(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(EngineError, match="save it as safetensors"):
        look_at(spec, 4)
