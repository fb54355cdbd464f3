"""`bench speculative` on a model of a few kilobytes: methods beside plain decoding, and the table beside theory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from configs.schema import SpeculativeConfig
from ops.bench.harness import BenchError, Plan
from ops.bench.speculative import PLAIN, Speaking, Spoken, Workload, run, sides, workloads
from ops.bench.speculative_table import Asked, Row, measure
from ops.bench.speculative_table import run as run_table
from tests.ops.bytes_model import write_bytes_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_bytes_model(tmp_path_factory.mktemp("bytes") / "tiny")


def few(made: list[Speaking]) -> list[Speaking]:
    """Work that a context of 512 bytes has room for."""
    work = [Workload("copying, 1", ["abcabcabcabc"], 12, copies=True), Workload("chat, 2", ["hi", "yes?"], 8, 0.8)]
    return [replace(side, work=work) for side in made]


async def test_every_side_says_the_same_and_is_measured(model_dir: Path) -> None:
    made = few(sides(model_dir, {"draft_model": model_dir}, ("ngram", "lookahead", "draft_model"), 8))
    report = await run(made, Plan(1, 0), lambda words: None)
    found = report.as_json()
    assert list(found["sides"]) == [PLAIN, "ngram", "lookahead", "draft_model"]
    assert all(figure["median"] > 0 for figures in found["sides"].values() for figure in figures.values())
    goals = {(ratio["side"], ratio["metric"]): ratio["goal"] for ratio in found["ratios"]}
    assert goals["ngram", "tok/s copying, 1"] == "≥ 1.8" and goals["lookahead", "tok/s copying, 1"] == "≥ 0.97"


@dataclass(slots=True)
class Lying(Speaking):
    """Says something else at the end."""

    def speak(self, work: Workload) -> Spoken:
        spoken = Speaking.speak(self, work)
        self.said[work.name][0][-1] += 1
        return spoken


async def test_a_side_that_says_other_tokens_voids_the_measurement(model_dir: Path) -> None:
    plain, ngram = few(sides(model_dir, {}, ("ngram",), 8))
    lying = Lying(ngram.name, ngram.model_dir, ngram.work, ngram.speculative)
    with pytest.raises(BenchError, match=r"ngram says other tokens .*copying, 1 after 11 tokens"):
        await run([plain, lying], Plan(1, 0), lambda words: None)


def test_the_work_is_copying_talking_and_noise() -> None:
    names = {work.name: work for work in workloads(64)}
    assert names["copying, 1"].copies and not names["chat, 8"].copies and names["noise, 1"].temperature == 2.0
    assert all(len(work.prompts) * work.num_tokens >= 64 for work in names.values())


async def test_the_table_has_every_length_and_what_theory_expects(model_dir: Path) -> None:
    plain, ngram = few(sides(model_dir, {}, ("ngram",), 8))
    ngram.speculative = SpeculativeConfig(method="ngram", prompt_lookup_min=1)
    rows = await measure(plain, [ngram], Asked((1, 4), 1), lambda words: None)
    assert [(row.workload, row.num_drafts) for row in rows] == [("copying, 1", 1), ("copying, 1", 4)]
    assert all(0 <= row.acceptance <= 1 and 0 < row.share <= 1 and row.measured > 0 for row in rows)
    report = await run_table(plain, [ngram], Asked((1,), 1), lambda words: None)
    assert "| ngram | copying, 1 | 1 |" in report.markdown() and "smoke run" in report.markdown()


def test_a_row_of_the_table_by_hand(model_dir: Path) -> None:
    """100 tokens in 100 plain steps of 1 s; with 2 guesses in each of 50 steps of 1.2 s: 30 fully right, 15 half."""
    side = Speaking("ngram", model_dir, ())
    work = Workload("w", ["p"], 100)
    pairs = [(Spoken(100, 100, 100.0, 0, ()), Spoken(125, 50, 60.0, 50, (45, 30)))]
    row = Row.of(side, work, 2, pairs)
    assert row.share == 1.0 and row.cost == pytest.approx(0.1)
    a = 75 / (75 + 20)  # right ones, and those tested that were wrong
    assert row.acceptance == pytest.approx(a, abs=1e-3)
    assert row.expected == pytest.approx((1 - a**3) / ((1 - a) * 1.2), abs=2e-3)
    assert row.measured == pytest.approx(125 / 60, abs=1e-3)
