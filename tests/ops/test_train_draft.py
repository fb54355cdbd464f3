"""`warmgate train-draft` on a model of a few kilobytes: what it writes guesses for that model, and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from configs.schema import SpeculativeConfig
from ops.cli import main
from tests.ops.bytes_model import write_bytes_model
from tests.replicas.engine.driver import build, make_request, run
from tests.replicas.engine.tiny import random_tokens

FEW = ("--tokens", "1024", "--minutes", "0.01", "--draft-vocab", "200")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_bytes_model(tmp_path_factory.mktemp("bytes") / "tiny")


def trained(model_dir: Path, out: Path, *words: str) -> dict[str, Any]:
    """The command's last line."""
    result = CliRunner().invoke(main, ["train-draft", str(model_dir), str(out), *FEW, *words], prog_name="warmgate")
    assert result.exit_code == 0, result.output
    summary: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return summary


def assert_guesses_change_nothing(model_dir: Path, speculative: SpeculativeConfig) -> None:
    requests = [make_request(str(n), random_tokens(n, seed=n), max_tokens=24, temperature=0.8) for n in (3, 20)]
    plain = run(build(model_dir, kv_cache_gib=0.01).core, requests)
    core = build(model_dir, kv_cache_gib=0.01, speculative=speculative).core
    assert {n: a.tokens for n, a in run(core, requests).items()} == {n: a.tokens for n, a in plain.items()}
    assert core.stats().num_drafts > 0


def test_a_head_is_trained_on_what_the_model_makes_up(model_dir: Path, tmp_path: Path) -> None:
    summary = trained(model_dir, tmp_path / "head", "--inner", "16")
    assert summary["method"] == "mlp_speculator" and summary["num_batches"] > 0 and len(summary["agreement"]) == 4
    speculative = SpeculativeConfig(method="mlp_speculator", model=str(tmp_path / "head"), adaptive=False)
    assert_guesses_change_nothing(model_dir, speculative)


def test_a_draft_model_is_made_of_the_models_layers_and_given_prompts(model_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n\n{"prompt": "Once"}\n')
    out = tmp_path / "small"
    summary = trained(model_dir, out, "--method", "draft_model", "--layers", "1", "--prompts", str(prompts))
    assert summary["method"] == "draft_model" and set(summary["agreement"]) == {"before", "after"}
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 1
    assert (out / "tokenizer.json").read_bytes() == (model_dir / "tokenizer.json").read_bytes()
    assert_guesses_change_nothing(
        model_dir, SpeculativeConfig(method="draft_model", model=str(out), adaptive=False, num_speculative_tokens=3)
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--method", "draft_model", "--layers", "2"), "keeps 1 to 1 of 2 layers, not 2"),
        (("--tokens", "100"), "100 is not in the range x>=1024"),
    ],
)
def test_what_cannot_be_trained_is_said(model_dir: Path, tmp_path: Path, words: tuple[str, ...], reason: str) -> None:
    result = CliRunner().invoke(
        main, ["train-draft", str(model_dir), str(tmp_path), *FEW, *words], prog_name="warmgate"
    )
    assert result.exit_code != 0 and reason in result.output


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"prompt": "Once"}\n\n{"prompt": ', "prompts.jsonl, line 3: Expecting value"),
        ('{"prompt": "Once"}\n["a"]', 'prompts.jsonl, line 2: neither "messages" (a list) nor "prompt" (a text)'),
        ('{"prompt": 5}', 'prompts.jsonl, line 1: neither "messages"'),
        ('{"messages": [5]}', "prompts.jsonl, line 1: "),
        ('{"prompt": ""}', "prompts.jsonl, line 1: the prompt is empty"),
        ("\n", "prompts.jsonl has no prompts"),
        ("\udcff", "prompts.jsonl cannot be read"),
    ],
)
def test_prompts_that_cannot_be_read_are_named_before_a_model_is_built(
    model_dir: Path, tmp_path: Path, text: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicas.engine.engine.build_engine", None)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(text.encode(errors="surrogateescape"))
    words = ["train-draft", str(model_dir), str(tmp_path / "out"), *FEW, "--prompts", str(prompts)]
    result = CliRunner().invoke(main, words, prog_name="warmgate")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert reason in result.output.replace("\n", " ") and "Traceback" not in result.output
