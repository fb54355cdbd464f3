"""`warmgate quantize-report` on a model of a few kilobytes: a table of every scheme, a plot, and results that last."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from configs.schema import EngineConfig
from configs.tokenizer import load_model_files
from ops.cli import main
from ops.quality import (
    Engine,
    Ledger,
    Subject,
    accuracy,
    has_quality,
    measure_perplexity,
    measure_quiz,
    perplexity,
    windows,
)
from ops.quality_table import Row, as_json, as_table
from ops.quiz import chosen, questions
from tests.ops.tiny_llama import write_tiny_llama

CONFIG = EngineConfig(kv_cache_gib=0.01, self_check=False, structured=False)
SMALL = ("--tokens", "300", "--questions", "3", "--visits", "1")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny")


def report(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["quantize-report", *map(str, words)], prog_name="warmgate")


def test_perplexity_is_that_of_transformers(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_model_files(str(model_dir), model_dir).tokenizer
    cut = windows("A sentence, and another one. " * 40, tokenizer, 700)
    assert [len(window) for window in cut] == [512, 188]
    subject, ledger = Subject("plain", model_dir, CONFIG), Ledger(tmp_path / "results.jsonl")
    assert sum(1 for _ in measure_perplexity(ledger, subject, Engine.load(subject), cut)) == 1
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    nats = [
        torch.nn.functional.cross_entropy(model(torch.tensor([w])).logits[0, :-1], torch.tensor(w[1:]), reduction="sum")
        for w in cut
    ]
    found = perplexity(ledger, subject)
    assert found is not None and found[1] == 698
    assert found[0] == pytest.approx(math.exp(sum(n.item() for n in nats) / 698), rel=1e-4)


def test_the_quiz_takes_the_likeliest_answer_per_token(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_model_files(str(model_dir), model_dir).tokenizer
    subject, ledger = Subject("plain", model_dir, CONFIG), Ledger(tmp_path / "results.jsonl")
    asked = questions()[:6]
    assert sum(1 for _ in measure_quiz(ledger, subject, Engine.load(subject), asked, tokenizer)) == 1
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    num_right = 0
    for question in asked:
        start, means = len(tokenizer.encode(question.prompt).ids), []
        for choice in question.choices:
            ids = tokenizer.encode(question.prompt + choice).ids
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
            means.append(logprobs[torch.arange(start - 1, len(ids) - 1), ids[start:]].mean().item())
        num_right += chosen(means) == question.answer
    assert accuracy(ledger, subject) == (num_right / 6, 6)


def test_questions_are_the_same_each_time_and_have_one_right_answer() -> None:
    found = questions()
    assert found == questions() and len(found) > 200
    assert all(len(set(question.choices)) == 4 for question in found)
    assert {question.answer for question in found} == {0, 1, 2, 3}


def test_a_report_that_could_not_be_drawn_measures_nothing(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    done = report(model_dir, "--out", tmp_path / "out", *SMALL)
    assert (done.exit_code, done.stdout, (tmp_path / "out" / "results.jsonl").exists()) == (1, "", False)
    assert done.stderr == f"error: a plot needs matplotlib: {sys.executable} -m pip install matplotlib\n"


def test_every_scheme_gets_a_row_and_the_plot_a_point(model_dir: Path, tmp_path: Path) -> None:
    names = ("bfloat16", "float32", "int8 on loading", "int8 cache", "nf4")
    asked = [word for name in names for word in ("--scheme", name)]
    awq, text = tmp_path / "tiny awq", tmp_path / "text"
    text.write_text("A sentence, and another one. " * 40)
    few = ["--text", str(text), "--sample-tokens", "64"]
    made = CliRunner().invoke(main, ["quantize", str(model_dir), "--method", "awq", "--out", str(awq), *few])
    assert made.exit_code == 0, made.output
    done = report(model_dir, "--out", tmp_path / "out", *SMALL, *asked, "--folder", awq)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads((tmp_path / "out" / "quantize-report.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert found["baseline"] == "bfloat16" and not found["failed"]
    assert tuple(rows) == (*names, "tiny awq")
    assert all((row["num_tokens"], row["num_questions"]) == (299, 3) for row in rows.values())
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    assert rows["nf4"]["weight_bytes"] < rows["bfloat16"]["weight_bytes"] < rows["float32"]["weight_bytes"]
    assert rows["int8 cache"]["kv_bytes_per_token"] < rows["float32"]["kv_bytes_per_token"]
    assert abs(rows["int8 on loading"]["perplexity_loss"]) < 0.1
    assert (tmp_path / "out" / "quantize-report.png").stat().st_size > 10_000
    last = json.loads(done.stdout.splitlines()[-1])
    assert last == found
    assert done.stdout.count("| nf4 |") == 1


def test_what_was_measured_is_not_measured_again(model_dir: Path, tmp_path: Path) -> None:
    words = (model_dir, "--out", tmp_path / "out", "--scheme", "bfloat16", "--scheme", "int8 on loading", *SMALL)
    assert report(*words).exit_code == 0
    results = tmp_path / "out" / "results.jsonl"
    before = results.read_text()
    again = report(*words)
    assert again.exit_code == 0 and "visit" not in again.stderr
    assert results.read_text() == before
    results.write_text(before[: len(before) // 2])  # a kill in the middle of a line
    assert report(*words).exit_code == 0
    assert len(Ledger.open(results).results) == before.count("\n")


def test_a_report_out_of_time_says_what_it_has_and_can_go_on(model_dir: Path, tmp_path: Path) -> None:
    words = (model_dir, "--out", tmp_path / "out", "--scheme", "bfloat16", "--scheme", "float32", *SMALL)
    stopped = report(*words, "--minutes", "0.0001")
    assert stopped.exit_code == 0, stopped.output
    assert "unfinished: call it again to go on" in stopped.stderr
    assert "| float32 | – |" in stopped.stdout
    done = report(*words)
    assert "unfinished" not in done.stderr and "| float32 | – |" not in done.stdout


def test_a_scheme_that_cannot_be_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "tiny", intermediate_size=72)
    done = report(model, "--out", tmp_path / "out", "--scheme", "bfloat16", "--scheme", "awq", *SMALL)
    assert done.exit_code == 0, done.output
    assert "awq: no group size of (128, 64, 32) divides matrices" in done.stderr
    assert "| awq |" not in done.stdout and "| bfloat16 |" in done.stdout


def test_losses_are_not_compared_over_different_texts(model_dir: Path) -> None:
    rows = [
        Row("bfloat16", 2e6, 10, 50.0, 8.0, 1000, 0.5, 10),
        Row("a", 1e6, 10, 100.0, 8.4, 1000, 0.5, 10),
        Row("b", 1e6, 10, None, 8.4, 900, 0.5, 10),
    ]
    table = as_table(rows)
    assert "| a | 1.0 | 10 | 100.0 | 2.00 | 8.400 | +5.00% | 1,000 | 50.0% | 10 |" in table
    assert "| b | 1.0 | 10 | – | – | 8.400 | – | 900 | 50.0% | 10 |" in table
    assert as_json(rows, {})["rows"][2]["perplexity_loss"] is None


def test_a_longer_text_measures_the_last_piece_anew(model_dir: Path, tmp_path: Path) -> None:
    subject, ledger = Subject("plain", model_dir, CONFIG), Ledger(tmp_path / "results.jsonl")
    ledger.put(subject, "perplexity", 0, {"nats": 1.0, "num_tokens": 9})
    assert has_quality(ledger, subject, [[1] * 10], [])
    assert not has_quality(ledger, subject, [[1] * 10, [1] * 5], [])
