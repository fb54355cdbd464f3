"""What `warmgate quantize` does to a layer: equal as floats, and nearer to them than rounding alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from configs.schema import EngineConfig
from replicas.contract import EngineError
from replicas.engine.families import read_spec
from replicas.engine.kernels.library import Kind, Offset
from replicas.engine.quantization import rounding
from replicas.engine.quantization.matrix import Quantised, rounded_inputs
from replicas.engine.quantization.methods import awq, gptq, recipes, refine, smooth, tuning, writing
from replicas.engine.quantization.methods.gptq import GptqSettings
from replicas.engine.quantization.methods.statistics import Statistics
from replicas.engine.quantization.methods.textbook import DOWN, MODULES, QKV, Layer, Original, Samples
from replicas.engine.quantization.methods.writing import Calibration, quantise_model
from replicas.engine.quantization.opening import open_source
from replicas.engine.quantization.source import Dequantised, SafetensorsSource
from replicas.engine.tensors import Checkpoint
from tests.replicas.engine.driver import build
from tests.replicas.engine.quantization.quantised_kit import SEQUENCES, make_plain
from tests.replicas.engine.tiny import random_tokens

GROUP = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain("qwen3", tmp_path_factory.mktemp("plain"))


@pytest.fixture
def layer(folder: Path) -> Layer:
    return Layer.read(SafetensorsSource(Checkpoint(folder), None), read_spec(folder), 0)


@pytest.fixture
def samples(folder: Path) -> Samples:
    return Samples.embedded(SafetensorsSource(Checkpoint(folder), None), SEQUENCES)


def loss(weight: Tensor, rounded: Tensor, products: Tensor) -> float:
    """|W X - Q X|² from Σ x xᵀ."""
    error = (rounded - weight).double()
    return float(((error @ products.double()) * error).sum())


@pytest.mark.parametrize("family", ["llama with biases", "qwen3", "mistral with window"])
@torch.no_grad()
def test_the_layers_that_calibration_sees_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    make_plain(family, tmp_path)
    source, spec, tokens = SafetensorsSource(Checkpoint(tmp_path), None), read_spec(tmp_path), random_tokens(40, 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    seen = Samples.embedded(source, [tokens])
    for i in range(spec.num_layers - 1):  # the last one's is given after the last norm
        torch.testing.assert_close(seen.hidden[0], states[i][0], atol=1e-4, rtol=1e-4)
        seen.advance(Layer.read(source, spec, i))


def test_statistics_are_sums_over_all_tokens(layer: Layer, samples: Samples) -> None:
    inputs: dict[str, list[Tensor]] = {}
    samples.run(layer, lambda module, x: inputs.setdefault(module, []).append(x))
    seen = Statistics(*MODULES)
    samples.run(layer, seen)
    for module in (QKV[2], DOWN):
        x = torch.cat(inputs[module])
        found = seen.of(module)
        torch.testing.assert_close(found.products, x.T @ x, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(found.mean_magnitude, x.abs().mean(0))
        assert torch.equal(found.largest, x.abs().amax(0))


@pytest.mark.parametrize(
    "scale",
    [
        lambda layer, seen: smooth.smooth(layer, seen, 0.5),
        lambda layer, seen: smooth.smooth(layer, seen, 0.9),
        lambda layer, seen: awq.scale_layer(layer, seen, GROUP),
    ],
    ids=["smooth", "smooth hard", "awq"],
)
def test_scaling_changes_weights_and_not_what_a_layer_says(
    scale: Callable[[Layer, Statistics], None], layer: Layer, samples: Samples
) -> None:
    before, old = [layer.forward(x, lambda *_: None) for x in samples.hidden], dict(layer.tensors)
    seen = Statistics(*MODULES)
    samples.run(layer, seen)
    scale(layer, seen)
    assert any(not torch.equal(layer.weight(module), old[f"{module}.weight"]) for module in MODULES)
    for x, y in zip(samples.hidden, before, strict=True):
        torch.testing.assert_close(layer.forward(x, lambda *_: None), y, atol=1e-4, rtol=1e-4)


def test_smoothing_makes_outliers_of_activations_smaller(layer: Layer, samples: Samples) -> None:
    layer.tensors["input_layernorm.weight"][5] *= 60  # one input column far beyond the others
    before, after = Statistics(*MODULES), Statistics(*MODULES)
    samples.run(layer, before)
    smooth.smooth(layer, before, 0.5)
    samples.run(layer, after)
    spread = [float(s.of(QKV[0]).largest.max() / s.of(QKV[0]).largest.median()) for s in (before, after)]
    assert spread[1] < spread[0] / 3


@pytest.mark.parametrize("by_importance", [False, True])
@pytest.mark.parametrize("group", [GROUP, 128, -1])
def test_gptq_loses_less_than_rounding(by_importance: bool, group: int, layer: Layer, samples: Samples) -> None:
    seen = Statistics(*MODULES)
    samples.run(layer, seen)
    for module in MODULES:
        weight, products = layer.weight(module), seen.of(module).products
        found = gptq.quantise(weight, products, GptqSettings(group, by_importance))
        assert found.offset is not None
        assert found.offset.min() >= 1 and found.offset.max() <= 15
        plain = rounding.to_int4(weight, group).dequantised()
        assert loss(weight, found.dequantised(), products) < 0.8 * loss(weight, plain, products), module


@pytest.mark.parametrize("by_importance", [False, True])
@pytest.mark.parametrize("group", [GROUP, 128, -1])
def test_a_second_look_loses_less(by_importance: bool, group: int, layer: Layer, samples: Samples) -> None:
    seen = Statistics(*MODULES)
    samples.run(layer, seen)
    for module in MODULES:
        weight, products = layer.weight(module), seen.of(module).products
        rough = gptq.quantise(weight, products, GptqSettings(group, by_importance))
        found = refine.refined(rough, weight, products, 0.01)
        assert loss(weight, found.dequantised(), products) < 0.99 * loss(weight, rough.dequantised(), products), module
        assert found.codes.max() <= 15 and torch.equal(found.scale, found.scale.half().float())


def test_a_second_look_finds_what_is_best_where_that_is_known() -> None:
    """One group of two columns that always come together: only the sum of their errors counts."""
    weight, products = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 0.999], [0.999, 1.0]])
    rough = Quantised(Kind.INTEGER4, torch.tensor([[1, 1]], dtype=torch.uint8), torch.ones(1, 1), 2, Offset.ZERO,
                      torch.ones(1, 1))  # fmt: skip
    found = refine.refined(rough, weight, products, 0.0)
    assert loss(weight, found.dequantised(), products) < 0.05 * loss(weight, rough.dequantised(), products)


def test_a_second_look_at_columns_that_no_input_has_breaks_nothing() -> None:
    weight, products = torch.randn(8, 64), torch.zeros(64, 64)
    found = refine.refined(gptq.quantise(weight, products, GptqSettings(GROUP)), weight, products, 0.01)
    assert torch.isfinite(found.dequantised()).all()


def test_gptq_with_inputs_that_know_nothing_of_each_other_is_rounding_to_its_grid() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 64)
    found = gptq.quantise(weight, torch.eye(64) * 100, GptqSettings(GROUP, damping=0.0))
    for start in (0, 32):
        part = weight[:, start : start + 32]
        scale, zero = gptq.fitted_grid(part)
        grid = ((part / scale[:, None] + zero[:, None]).round().clamp(0, 15) - zero[:, None]) * scale[:, None]
        assert torch.allclose(found.dequantised()[:, start : start + 32], grid, atol=1e-6)


def test_gptq_gives_columns_that_no_input_has_nothing(layer: Layer) -> None:
    products = torch.randn(64, 200)
    products[7] = 0
    found = gptq.quantise(layer.weight(QKV[0]), products @ products.T, GptqSettings(GROUP))
    assert torch.isfinite(found.dequantised()).all()
    assert not found.dequantised()[:, 7].any()


def test_awq_loses_less_than_rounding(layer: Layer, samples: Samples) -> None:
    layer.tensors["input_layernorm.weight"][5] *= 30
    layer.tensors["post_attention_layernorm.weight"][9] *= 30
    plain, before, after = dict(layer.tensors), Statistics(*MODULES), Statistics(*MODULES)
    samples.run(layer, before)
    awq.scale_layer(layer, before, GROUP)
    samples.run(layer, after)
    for module in MODULES:
        rounded = rounding.to_int4(plain[f"{module}.weight"], GROUP).dequantised()
        alone = loss(plain[f"{module}.weight"], rounded, before.of(module).products)
        scaled = layer.weight(module)
        found = gptq.quantise(scaled, after.of(module).products, GptqSettings(GROUP))
        assert loss(scaled, found.dequantised(), after.of(module).products) < alone, module


def test_a_checkpoint_of_several_files_is_served(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_SHARD_BYTES", 20_000)
    quantise_model(folder, tmp_path / "out", recipes.Awq(GROUP), Calibration(SEQUENCES), lambda *progress: None)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1 and all((tmp_path / "out" / name).is_file() for name in files)
    assert build(tmp_path / "out", self_check=True).facts.quantization == "awq"


def test_a_failure_leaves_no_folder(folder: Path, tmp_path: Path) -> None:
    def broken(what: str, done: int, total: int) -> None:
        if done == 1:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        quantise_model(folder, tmp_path / "out", recipes.Nf4(), Calibration(), broken)
    assert not list(tmp_path.iterdir())


def test_a_group_that_divides_no_matrix_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="64 columns, which are no whole groups of 48"):
        quantise_model(folder, tmp_path / "out", recipes.Awq(48), Calibration(SEQUENCES), lambda *progress: None)


def last_hidden(folder: Path, sequences: list[list[int]]) -> list[Tensor]:
    """What a checkpoint makes of sequences before its last norm, matrices as floats, inputs as those round them."""
    spec = read_spec(folder)
    opened = open_source(folder, spec, EngineConfig(), has_kernels=False)
    source = Dequantised(opened.source, spec)
    samples = Samples.embedded(source, sequences)
    for i in range(spec.num_layers):
        layer = Layer.read(source, spec, i)
        samples.advance(replace(layer, rounding=to_int8) if opened.method == "compressed-tensors" else layer)
    return samples.hidden


def to_int8(module: str, x: Tensor) -> Tensor:
    return rounded_inputs(x, rounding.to_w8a8(torch.eye(2)))


@pytest.mark.parametrize(
    "recipe",
    [recipes.Awq(GROUP), recipes.Gptq(GptqSettings(GROUP, by_importance=True)), recipes.Int8()],
    ids=["awq", "gptq sorted", "int8"],
)
def test_tuning_brings_predictions_nearer_to_the_original_and_keeps_every_code(
    recipe: recipes.Recipe, folder: Path, tmp_path: Path
) -> None:
    seen = [random_tokens(32, seed) for seed in range(300)]
    unseen = [random_tokens(32, seed) for seed in range(1000, 1020)]
    spec = read_spec(folder)
    ends = tuning.Ends.read(Original(SafetensorsSource(Checkpoint(folder), None), spec))
    exact = last_hidden(folder, unseen)
    lost: list[float] = []
    codes: list[list[Tensor]] = []
    for name, texts in (("as rounded", Calibration(SEQUENCES)), ("tuned", Calibration(SEQUENCES, seen))):
        quantise_model(folder, tmp_path / name, recipe, texts, lambda *progress: None)
        found = last_hidden(tmp_path / name, unseen)
        lost.append(sum(float(ends.divergence(x, y)) for x, y in zip(found, exact, strict=True)))
        tensors = Checkpoint(tmp_path / name)
        weight = "weight" if isinstance(recipe, recipes.Int8) else "qweight"
        names = [f"model.layers.{i}.{module}.{weight}" for i in range(spec.num_layers) for module in MODULES]
        codes.append([tensors.get(each) for each in names])
    assert lost[1] < 0.97 * lost[0], lost
    assert all(torch.equal(one, other) for one, other in zip(*codes, strict=True))


@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize("family", ["llama with biases", "qwen3", "mistral with window"])
@torch.no_grad()
def test_what_is_tuned_is_the_textbooks_layer(family: str, group: int, tmp_path: Path) -> None:
    make_plain(family, tmp_path)
    original = Original(SafetensorsSource(Checkpoint(tmp_path), None), read_spec(tmp_path))
    samples = Samples.embedded(original.source, SEQUENCES)
    layer = original.layer(0)
    recipe = recipes.Gptq(GptqSettings(group, by_importance=True))
    matrices = recipe.quantise(layer, Samples(list(samples.hidden)))
    tunable = tuning.Tunable.of(0, layer.spec, tuning.QuantisedLayer.of(layer, matrices))
    for x in samples.hidden:
        torch.testing.assert_close(tunable.forward(x), layer.forward(x, lambda *_: None), atol=1e-4, rtol=1e-4)
    result = tunable.result()
    assert result.kept.keys() | {f"{module}.weight" for module in MODULES} == layer.tensors.keys()
    for module in MODULES:  # before any step scales are what they were, as they are stored
        torch.testing.assert_close(result.matrices[module].scale, matrices[module].scale.half().float())


def test_tables_are_not_tuned(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="only integer codes can be tuned"):
        quantise_model(folder, tmp_path / "out", recipes.Nf4(), Calibration((), SEQUENCES), lambda *progress: None)
