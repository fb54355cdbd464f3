"""`bench lora-routing` on a model of a few kilobytes: real replicas, every token checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from ops.bench import lora_routing
from ops.bench.harness import BenchError, Plan
from ops.bench.lora_routing import FleetSide, Workload
from tests.replicas.engine.tiny import VOCAB, make_tiny


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny("llama", folder)
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return Workload(
        folder, num_adapters=6, num_requests=24, max_tokens=8, num_prompt_tokens=12, num_slots=2, strength=0.3
    )


async def test_both_policies_swap_adapters_and_nobody_says_anothers_tokens(workload: Workload) -> None:
    report = await lora_routing.run(workload, ["native"], Plan(1, 0), lambda words: None)
    sides = report.as_json()["sides"]
    assert list(sides) == ["native, warm", "native, least_outstanding"]
    assert all(figure["median"] > 0 for figures in sides.values() for figure in figures.values())
    assert all(figures["swaps a request"]["median"] <= 1 for figures in sides.values())
    assert all(": 24 answers checked token by token, none is another adapter's" in note for note in report.notes)


def test_an_answer_that_goes_on_as_another_adapters_would_is_an_error(workload: Workload) -> None:
    alone = {(0, 0): [1, 2, 3, 4], (1, 0): [1, 5, 6, 7], (1, 1): [9, 9, 9, 9]}
    side = FleetSide("x", workload.profile("native", "warm"), workload, Path(), [], alone)
    side._check(0, 0, [1, 2, 3, 4])
    side._check(0, 0, [1, 2, 8, 8])
    assert (side.num_answers, side.num_parted) == (2, 1)
    with pytest.raises(BenchError, match="adapter 0 was answered as nobody would"):
        side._check(0, 0, [9, 9, 9, 9])
    with pytest.raises(BenchError, match="adapter 0 was answered as 1 would"):
        side._check(0, 0, [1, 5, 6, 8])
