"""`warmgate quantize` on a model of a few kilobytes: what it writes is served, and loses little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file

from configs.tokenizer import load_model_files
from ops.cli import main
from ops.quantize import spread
from ops.texts import calibration_text, evaluation_text
from tests.ops.tiny_llama import write_tiny_llama
from tests.replicas.engine.driver import build, make_request, run

METHODS: dict[str, tuple[list[str], str]] = {
    "int8": ([], "compressed-tensors"),
    "nf4": ([], "bitsandbytes"),
    "nf4 --double-quant": (["--double-quant"], "bitsandbytes"),
    "gptq": ([], "gptq"),
    "gptq --act-order": (["--act-order", "--group-size", "32"], "gptq"),
    "gptq -1": (["--group-size", "-1"], "gptq"),
    "awq": (["--group-size", "32"], "awq"),
    "awq -1": (["--group-size", "-1"], "awq"),
}
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 20)
    return path


def quantize(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["quantize", *map(str, words)], prog_name="warmgate")


def logprobs(folder: Path, **settings: Any) -> torch.Tensor:
    """What the engine makes of the text: its score of every token."""
    core = build(folder, kv_cache_gib=0.01, **settings).core
    ids = load_model_files(str(folder), folder).tokenizer.encode(TEXT * 3).ids
    found = run(core, [make_request("a", ids, prompt_logprobs=0, max_tokens=1)])["a"].prompt_logprobs
    assert found is not None
    return torch.tensor([each.logprob for each in found if each is not None])


@pytest.mark.parametrize("name", METHODS)
def test_what_is_written_is_served_and_loses_little(name: str, model_dir: Path, text: Path, tmp_path: Path) -> None:
    options, format_name = METHODS[name]
    out = tmp_path / "out"
    few = ["--samples", "8", "--sample-tokens", "128", "--text", str(text)]
    result = quantize(model_dir, "--method", name.split()[0], "--out", out, *few, *options)
    assert result.exit_code == 0, result.output
    assert "2 of 2 layers" in result.output and "MB of weights" in result.output
    assert ("tuning steps" in result.output) == (name.split()[0] != "nf4")
    assert build(out, self_check=True, kv_cache_gib=0.01).facts.quantization == format_name
    exact = logprobs(model_dir)
    most = {"int8": 0.1, "nf4": 0.8}.get(name.split()[0], 1.0 if "-1" in name else 0.6)
    assert (logprobs(out, head_quantization="none") - exact).abs().mean() < most
    with safe_open(out / "model.safetensors", "pt") as file:
        head, norms = file.get_tensor("lm_head.weight"), file.get_tensor("model.norm.weight")
    assert head.shape == (259, 64) and head.dtype in (torch.float16, torch.bfloat16) and norms.dtype == head.dtype
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {path.name for path in out.iterdir()}
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == format_name
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


def test_tuning_is_asked_for_by_its_number_of_sequences(model_dir: Path, text: Path, tmp_path: Path) -> None:
    few = ["--method", "awq", "--samples", "4", "--sample-tokens", "64", "--text", text]
    tuned = quantize(model_dir, *few, "--out", tmp_path / "tuned", "--tune", "30")
    assert tuned.exit_code == 0 and "30 of 30 tuning steps" in tuned.output
    rounded = quantize(model_dir, *few, "--out", tmp_path / "rounded", "--tune", "0")
    assert rounded.exit_code == 0 and "tuning steps" not in rounded.output
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "rounded")]
    module = "model.layers.0.mlp.up_proj"
    assert torch.equal(*(file[f"{module}.qweight"] for file in files))
    assert not torch.equal(*(file[f"{module}.scales"] for file in files))


@pytest.mark.parametrize(
    ("method", "option", "words"),
    [
        ("nf4", ["--tune", "3"], "--tune is for int8, gptq and awq, not for nf4"),
        ("int8", ["--group-size", "32"], "--group-size is for gptq and awq, not for int8"),
        ("awq", ["--act-order"], "--act-order is for gptq, not for awq"),
        ("gptq", ["--double-quant"], "--double-quant is for nf4, not for gptq"),
    ],
)
def test_options_of_other_methods_are_refused(
    method: str, option: list[str], words: str, model_dir: Path, tmp_path: Path
) -> None:
    refused = quantize(model_dir, "--method", method, "--out", tmp_path / "out", *option)
    assert refused.exit_code == 1 and words in refused.output and not (tmp_path / "out").exists()


def test_the_folder_beside_the_model_is_the_default_and_is_never_overwritten(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny")
    assert quantize(model, "--method", "nf4").exit_code == 0
    assert (tmp_path / "tiny-nf4" / "model.safetensors").is_file()
    again = quantize(model, "--method", "nf4")
    assert again.exit_code == 1
    assert "tiny-nf4 exists already: choose another with --out, or remove it" in again.output


def test_a_quantised_model_is_not_quantised_again(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny")
    assert quantize(model, "--method", "nf4").exit_code == 0
    again = quantize(tmp_path / "tiny-nf4", "--method", "nf4")
    assert again.exit_code == 1 and "is quantised already, with bitsandbytes" in again.output
    assert not (tmp_path / "tiny-nf4-nf4").exists()


@pytest.mark.parametrize("method", ["nf4", "gptq", "awq"])
def test_matrices_that_groups_do_not_divide_are_refused(method: str, tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny", intermediate_size=72)
    result = quantize(model, "--method", method)
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "72" in result.output and list(tmp_path.iterdir()) == [model]


def test_too_short_a_text_and_an_unknown_model_are_one_line(model_dir: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    result = quantize(model_dir, "--method", "awq", "--text", short, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "the calibration text has 10 tokens, fewer than one sequence of 512" in result.output
    assert quantize(tmp_path / "nothing", "--method", "awq").exit_code == 2


def test_calibration_samples_are_spread_over_the_text() -> None:
    pieces = [[i] for i in range(10)]
    assert spread(pieces, 5) == [[0], [2], [4], [6], [8]]
    assert spread(pieces, 50) == pieces


def test_texts_are_long_enough_and_not_the_same() -> None:
    evaluation, calibration = evaluation_text(), calibration_text()
    assert len(evaluation.split()) > 60_000 and len(calibration.split()) > 20_000
    sentences = {line for line in calibration.splitlines() if len(line) > 60}
    assert sum(line in evaluation for line in sentences) / len(sentences) < 0.01
