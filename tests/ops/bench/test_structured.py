"""The grammar benchmark on a vocabulary of letters: it runs, and says what it says it measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ops.bench.harness import BenchError, Plan
from ops.bench.structured import GRAMMARS, METRIC, run
from tests.ops.tiny import hub_files

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


def make_model(folder: Path) -> Path:
    """A description and a tokenizer: the sampler needs no weights."""
    for name, data in hub_files(64).items():
        (folder / name).write_bytes(data)
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, **LLAMA}))
    return folder


async def test_every_grammar_is_measured_beside_none(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    report = await run(folder, 2, Plan(1, 0), lambda words: None)
    assert set(report.samples.by_side) == set(GRAMMARS)
    assert all(sample[METRIC] > 0 for samples in report.samples.by_side.values() for sample in samples)
    assert {ratio.side for ratio in report.ratios} == set(GRAMMARS) - {"no grammar"}
    assert report.facts["JSON schema: compile ms"] > 0 and report.facts["JSON schema: guard ms"] > 0


async def test_a_model_without_a_tokenizer_cannot_be_measured(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BenchError, match="no tokenizer"):
        await run(folder, 1, Plan(1, 0), lambda words: None)
