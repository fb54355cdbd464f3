"""Checkpoints in one file, in shards, in half precision; broken ones are named."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from replicas.contract import EngineError
from replicas.engine.families import read_spec
from replicas.engine.linear import PackedLinear, PlainLinear, can_pack
from replicas.engine.weights import Checkpoint, WeightLoader
from tests.replicas.engine.conftest import TinyModels
from tests.replicas.engine.tiny import GATHERED, ByHand, make_sequence, random_tokens, scattered_tables


def logits(folder: Path) -> torch.Tensor:
    seq = make_sequence(random_tokens(20, seed=1))
    scattered_tables(seq, capacity=20)
    return ByHand.load(folder, GATHERED).step((seq, 0, 20))[0]


def load(folder: Path) -> None:
    WeightLoader(Checkpoint(folder), read_spec(folder), torch.float32, torch.device("cpu")).load()


@pytest.fixture
def folder(tiny_model: TinyModels, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_model("qwen2")[0], tmp_path / "model"))


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


def test_a_sharded_checkpoint_gives_the_same_logits(folder: Path) -> None:
    expected = logits(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(folder), expected)


def test_a_bfloat16_checkpoint_is_widened_exactly(folder: Path) -> None:
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    rewrite(folder, {name: tensor.float() for name, tensor in rounded.items()})
    expected = logits(folder)
    rewrite(folder, rounded)
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_stays_in_its_file(dtype: torch.dtype, folder: Path) -> None:
    """A file that is overwritten must not change a model that is loaded, nor one that is cut end the process."""
    rewrite(folder, {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()})
    weights = WeightLoader(Checkpoint(folder), read_spec(folder), torch.float32, torch.device("cpu")).load()
    gc.collect()
    if Path("/proc/self/maps").is_file():
        assert str(folder) not in Path("/proc/self/maps").read_text()
    tokens = torch.arange(weights.embedding.vocab_size)
    before = weights.embedding(tokens)
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(bytes((folder / "model.safetensors").stat().st_size))
    assert torch.equal(weights.embedding(tokens), before)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    rewrite(folder, tensors)
    with pytest.raises(EngineError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias"):
        load(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    rewrite(folder, tensors)
    with pytest.raises(EngineError, match=r"model\.norm\.weight has shape \(7,\), config\.json implies \(96,\)"):
        load(folder)


def test_a_truncated_file_is_an_engine_error(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(EngineError, match=r"cannot be read"):
        load(folder)


def test_a_folder_without_weights_is_an_engine_error(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(EngineError, match=r"holds no \*\.safetensors"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 31, 200])
def test_packed_products_equal_plain_ones(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(70, 48).to(dtype), torch.randn(70).to(dtype), torch.randn(rows, 48).to(dtype)
    if not can_pack(weight):
        pytest.skip(f"oneDNN has no packed {dtype} product on this machine")
    exact = PlainLinear(weight.double(), bias.double())(x.double())
    error = (PackedLinear(weight, bias)(x).double() - exact).abs()
    sums = PlainLinear(weight.double().abs(), bias.double().abs())(x.double().abs())
    # In whatever order a machine's kernel adds in float32, then rounds to dtype (Higham 2002, 3.1).
    bound = sums * (weight.shape[1] + 1) * torch.finfo(torch.float32).eps + exact.abs() * torch.finfo(dtype).eps
    assert (error <= bound).all()
