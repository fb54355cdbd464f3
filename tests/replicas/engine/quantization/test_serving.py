"""Quantised models served: every score and every token is that of transformers on the floats that the weights mean."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.schema import EngineConfig
from replicas.contract import EngineError
from replicas.engine.families import read_spec
from replicas.engine.kernels.library import Kernels
from replicas.engine.quantization.linears import QuantisedLinears
from replicas.engine.quantization.opening import open_source
from replicas.engine.quantization.source import Dequantised
from replicas.engine.self_check import reference_logits
from replicas.engine.weights import WeightLoader
from tests.replicas.engine.driver import Answer, build, make_request, run
from tests.replicas.engine.quantization.quantised_kit import (
    CHECKPOINTS,
    ON_THE_FLY,
    RECIPES,
    make_plain,
    make_with,
    meant,
)
from tests.replicas.engine.tiny import oracle_logits, random_tokens

SMALL: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 6, "max_model_len": 128}
LENGTHS = (5, 33, 70)
MakeFolder = Callable[[str], Path]

NATS = {"auto": 5e-3, "none": 3e-4}
"""How far scores may be from the oracle's: compiled products of integers take activations with 15 bits."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain("llama with biases", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def plain_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain("llama tied", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def folder_of(plain: Path, plain_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """name of a checkpoint → its folder; GGUF's are tied and without biases, as llama.cpp knows llamas."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("made") / "model"
            CHECKPOINTS[name](plain_llama if "gguf" in name else plain, made[name])
        return made[name]

    return get


def answers_of(folder: Path, **settings: Any) -> dict[str, Answer]:
    """Some prompts at once, scored and continued."""
    core = build(folder, **SMALL, **settings).core
    prompts = [make_request(str(n), random_tokens(n, seed=n), prompt_logprobs=0, logprobs=0) for n in LENGTHS]
    return run(core, prompts)


def check(answers: dict[str, Answer], logits_of: Callable[[list[int]], torch.Tensor], most: float) -> None:
    """Scores of prompts and answers are the oracle's, and the chosen tokens its likeliest, within `most` nats."""
    for n in LENGTHS:
        prompt, answer = random_tokens(n, seed=n), answers[str(n)]
        tokens = prompt + answer.tokens
        expected = torch.log_softmax(logits_of(tokens[:-1]).float(), dim=-1)
        scores = [entry.logprob for entry in (answer.prompt_logprobs or ()) if entry is not None]
        scores += [entry.logprob for entry in answer.logprobs]
        assert len(scores) == len(tokens) - 1
        wanted = expected[torch.arange(len(tokens) - 1), tokens[1:]]
        assert (torch.tensor(scores) - wanted).abs().max() < most, n
        gap = expected[n - 1 :].max(dim=-1).values - wanted[n - 1 :]
        assert gap.max() < most, n


def transformers_on(folder: Path) -> Callable[[list[int]], torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    return lambda tokens: oracle_logits(model, tokens)


def textbook(folder: Path, **settings: Any) -> Callable[[list[int]], torch.Tensor]:
    """The slow obvious decoder that rounds inputs too, which transformers does not."""
    spec = read_spec(folder)
    source = open_source(folder, spec, EngineConfig(**settings), has_kernels=False).source
    floats = Dequantised(source, spec)
    logits = reference_logits(floats, spec, torch.device("cpu"), floats.inputs)
    return lambda tokens: logits(tokens, len(tokens))


WITH_AND_WITHOUT = pytest.mark.parametrize("compiled", ["auto", "none"])


@WITH_AND_WITHOUT
@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "int8"])
def test_a_quantised_checkpoint_answers_as_what_it_means(
    name: str, compiled: str, folder_of: MakeFolder, plain: Path, plain_llama: Path, tmp_path: Path, kernels: Kernels
) -> None:
    folder = folder_of(name)
    floats = meant(folder, plain_llama if "gguf" in name else plain, tmp_path / "floats")
    check(answers_of(folder, kernels=compiled, head_quantization="none"), transformers_on(floats), NATS[compiled])


@WITH_AND_WITHOUT
@pytest.mark.parametrize("name", [name for name in ON_THE_FLY if name != "w8a8"])
def test_weights_rounded_on_loading_answer_as_what_they_mean(
    name: str, compiled: str, plain: Path, tmp_path: Path, kernels: Kernels
) -> None:
    settings = {"head_quantization": "none", **ON_THE_FLY[name]}
    floats = meant(plain, plain, tmp_path / "floats", **settings)
    check(answers_of(plain, kernels=compiled, **settings), transformers_on(floats), NATS[compiled])


@WITH_AND_WITHOUT
@pytest.mark.parametrize("name", ["int8", "w8a8"])
def test_inputs_rounded_to_8_bits_are_those_of_the_textbook(
    name: str, compiled: str, folder_of: MakeFolder, plain: Path, kernels: Kernels
) -> None:
    settings = {"head_quantization": "none", **({} if name == "int8" else ON_THE_FLY[name])}
    folder = folder_of(name) if name == "int8" else plain
    # An input on the edge between two codes may fall on either side: some hundredths of a nat.
    check(answers_of(folder, kernels=compiled, **settings), textbook(folder, **settings), 0.1)


@pytest.mark.parametrize("family", ["qwen2", "qwen3 tied", "mistral with window"])
def test_other_families_are_quantised_alike(family: str, tmp_path: Path, kernels: Kernels) -> None:
    plain = make_plain(family, tmp_path / "plain")
    make_with(RECIPES["awq"])(plain, tmp_path / "awq")
    floats = meant(tmp_path / "awq", plain, tmp_path / "floats")
    check(answers_of(tmp_path / "awq", head_quantization="none"), transformers_on(floats), NATS["auto"])


@pytest.mark.parametrize("name", [*CHECKPOINTS])
def test_facts_name_the_method_and_the_self_check_passes(name: str, folder_of: MakeFolder, kernels: Kernels) -> None:
    facts = build(folder_of(name), self_check=True).facts
    assert facts.self_check.startswith("passed"), facts.self_check
    methods = {"gguf": "gguf", "gptq": "gptq", "awq": "awq", "nf4": "bitsandbytes", "fp8 in": "fp8"}
    wanted = next((method for start, method in methods.items() if name.startswith(start)), "compressed-tensors")
    assert facts.quantization == wanted


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.28), ("int4", 0.21), ("nf4", 0.2), ("fp8", 0.28)])
def test_memory_is_what_the_codes_take(scheme: str, most: float, plain: Path, kernels: Kernels) -> None:
    floats = build(plain, **SMALL).facts.weight_bytes
    for compiled in ("auto", "none"):
        settings = {**ON_THE_FLY[scheme], "head_quantization": "none", "kernels": compiled}
        facts = build(plain, **SMALL, **settings).facts
        ends = 2 * 97 * 64 * 4  # embedding and head stay as they are
        assert (facts.weight_bytes - ends) / (floats - ends) < most


def test_without_a_compiler_a_quantised_model_is_served_and_the_log_says_how(
    plain: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("WARMGATE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        slow = answers_of(plain, quantization="int4")
    assert "no compiled kernels, torch's own operators are used, which are slower: no C++ compiler" in caplog.text
    assert {n: a.tokens for n, a in slow.items()} == {
        n: a.tokens for n, a in answers_of(plain, quantization="int4", kernels="none").items()
    }


@pytest.mark.parametrize("changes", [{"kernels": "none"}, {"dtype": "bfloat16"}])
def test_what_would_not_use_kernels_compiles_none(
    changes: dict[str, str], plain: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WARMGATE_HOME", str(tmp_path))
    build(plain, **{**SMALL, **changes})
    assert not (tmp_path / "kernels").exists()


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ("gptq", "is quantised with awq, engine.quantization asks for gptq"),
        ("int8", "is quantised with awq, engine.quantization asks for int8"),
    ],
)
def test_another_method_than_the_checkpoint_has_is_refused(
    quantization: str, words: str, folder_of: MakeFolder
) -> None:
    with pytest.raises(EngineError, match=words):
        build(folder_of("awq"), quantization=quantization)


def test_a_method_of_checkpoints_cannot_be_asked_of_plain_weights(plain: Path) -> None:
    with pytest.raises(EngineError, match=r"holds plain weights, engine\.quantization asks for awq"):
        build(plain, quantization="awq")


def test_two_gguf_files_in_a_folder_are_refused(folder_of: MakeFolder, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes((folder_of("gguf q4_0") / "model.gguf").read_bytes())
    (tmp_path / "config.json").write_bytes((folder_of("gguf q4_0") / "config.json").read_bytes())
    with pytest.raises(EngineError, match=r"holds 2 GGUF files: a\.gguf, b\.gguf"):
        build(tmp_path)


def test_a_broken_gguf_is_an_engine_error(folder_of: MakeFolder, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes((folder_of("gguf q4_0") / "model.gguf").read_bytes()[:900])
    (tmp_path / "config.json").write_bytes((folder_of("gguf q4_0") / "config.json").read_bytes())
    with pytest.raises(EngineError, match=r"model\.gguf"):
        build(tmp_path)


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_no_quantised_weight_stays_in_its_file(
    name: str, has_kernels: bool, folder_of: MakeFolder, kernels: Kernels
) -> None:
    folder, config = folder_of(name), EngineConfig()
    spec = read_spec(folder)
    linears = QuantisedLinears(kernels if has_kernels else None, torch.device("cpu"))
    source = open_source(folder, spec, config, has_kernels).source
    weights = WeightLoader(source, spec, torch.float32, torch.device("cpu"), linears).load()
    del source
    gc.collect()
    if Path("/proc/self/maps").is_file():
        assert str(folder) not in Path("/proc/self/maps").read_text()
    assert weights.embedding.vocab_size == spec.vocab_size
