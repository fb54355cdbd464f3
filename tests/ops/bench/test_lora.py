"""`bench lora` on a model of a few kilobytes: every side measures, the fleet answers with adapters it had to load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from ops.bench import lora
from ops.bench.harness import Plan
from ops.bench.lora_fleet import WITH, WITHOUT, FleetWorkload
from tests.replicas.engine.tiny import VOCAB, make_tiny


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny("llama", folder)
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder


async def test_every_side_of_the_benchmark_measures(model_dir: Path) -> None:
    fleet = FleetWorkload(num_adapters=9, num_folders=2, num_requests=12, num_replicas=1, num_slots=2, max_tokens=3)
    workload = lora.Workload(model_dir, (1, 3, 4, 9), 4, 4, (4, 8), num_steps=2, num_swaps=2, fleet=fleet)
    report = await lora.run(workload, Plan(1, 0), lambda words: None)
    sides = report.as_json()["sides"]
    shared = [lora.with_adapters(n) for n in workload.levels]
    assert list(sides) == [lora.BASE, *shared, lora.MIXED, WITH, WITHOUT]
    assert all(figure["median"] > 0 for figures in sides.values() for figure in figures.values())
    batches = {name: [int(metric.split()[1]) for metric in sides[name]] for name in shared}
    assert batches == {"1 adapter": [1, 3, 4, 9], "3 adapters": [3, 4, 9], "4 adapters": [4, 9], "9 adapters": [4, 9]}
    assert report.facts["models listed"] == 1 + 9
    assert 0 < report.facts["swap pause, ms, median"] <= report.facts["swap pause, ms, longest"]
    assert report.ratios[-1].against == WITHOUT
