"""Drafters trained on tiny models: what they learn, what is written, and that speech with them is the model's own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import SpeculativeConfig
from replicas.contract import EngineError
from replicas.engine.speculative.mlp import MlpSpec, MlpWeights, load, save
from replicas.engine.speculative.training.distil import DistilPlan, distil, kept_layers
from replicas.engine.speculative.training.heads import HeadPlan, tables, train_heads
from replicas.engine.speculative.training.texts import Text, TextPlan, generate, likeliest_tokens
from tests.replicas.engine.driver import build, make_request, run
from tests.replicas.engine.tiny import VOCAB, make_tiny, random_tokens

SMALL: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 48, "max_num_seqs": 6, "max_model_len": 200}
SPEC = MlpSpec(hidden_size=96, vocab_size=VOCAB, inner_size=64, draft_vocab_size=64)


def ticking(num_ticks: int) -> Callable[[], float]:
    """A clock on which that many looks take a second."""
    ticks = count()
    return lambda: next(ticks) / num_ticks


def silent(words: str) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that minds its last token most: one that can be foreseen."""
    folder = tmp_path_factory.mktemp("foreseeable")
    model = make_tiny("llama", folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(0.02)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(folder: Path) -> list[Text]:
    return generate(build(folder, **SMALL).core, [[1], [1, 5, 6]], TextPlan(2400, 60, seed=3), silent)


@pytest.fixture(scope="module")
def ends(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and head of the model."""
    return tables(build(folder, **SMALL).core.runner.decoder)  # type: ignore[attr-defined]


def test_texts_are_what_the_engine_says_with_the_features_it_was_drawn_from(
    texts: list[Text], ends: tuple[torch.Tensor, torch.Tensor]
) -> None:
    assert len(texts) == 40 and {text.first for text in texts} == {1, 3}
    assert all(len(text.features) == len(text.tokens) - text.first == 60 for text in texts)
    likeliest = torch.stack([(text.features.float() @ ends[1].T).argmax(dim=-1) for text in texts])
    said = torch.stack([text.tokens[text.first :] for text in texts])
    assert 0.3 < (likeliest == said).float().mean() < 1.0, "drawn from its own feature, not the next one's"


def test_the_likeliest_tokens_are_those_said_most_often(texts: list[Text]) -> None:
    counts = torch.bincount(torch.cat([text.tokens[text.first :] for text in texts]), minlength=VOCAB)
    top = likeliest_tokens(texts, 10, VOCAB)
    assert counts[top].min() >= counts[[i for i in range(VOCAB) if i not in top.tolist()]].max()


@pytest.fixture(scope="module")
def heads(texts: list[Text], ends: tuple[torch.Tensor, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = HeadPlan(seconds=1.0, learning_rate=3e-3, num_stretches=8, length=8, num_steps=3)
    result = train_heads(texts, *ends, SPEC, plan, progress=silent, clock=ticking(150))
    untrained = train_heads(texts, *ends, SPEC, plan, progress=silent, clock=ticking(1))
    assert result.num_batches == 149 and untrained.num_batches == 0
    assert result.agreement[0] > 2 * untrained.agreement[0]
    folder = tmp_path_factory.mktemp("heads")
    save(folder, SPEC, result.weights, {"agreement": result.agreement})
    return folder


def answers(folder: Path, speculative: SpeculativeConfig | None, **sampling: Any) -> tuple[list[list[int]], Any]:
    core = build(folder, **SMALL, speculative=speculative).core
    wanted = [make_request(str(n), random_tokens(n, seed=n), seed=n, max_tokens=30, **sampling) for n in (2, 9, 30)]
    return [answer.tokens for answer in run(core, wanted).values()], core.stats()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trained_heads_guess_and_never_change_the_tokens(heads: Path, folder: Path, temperature: float) -> None:
    asked = SpeculativeConfig(method="mlp_speculator", model=str(heads), num_speculative_tokens=3, adaptive=False)
    guessed, stats = answers(folder, asked, temperature=temperature)
    plain, _ = answers(folder, None, temperature=temperature)
    assert guessed == plain
    assert stats.num_accepted_by_position[0] > 0.1 * stats.num_drafts


def test_a_distilled_model_guesses_and_never_changes_the_tokens(
    texts: list[Text], folder: Path, tmp_path: Path
) -> None:
    plan = DistilPlan(seconds=1.0, num_layers=2, num_scored=VOCAB, learning_rate=2e-3)
    result = distil(folder, tmp_path / "small", texts, plan, progress=silent, clock=ticking(60))
    assert result.num_batches == 59 and result.agreement > result.agreement_before
    assert json.loads((tmp_path / "small" / "config.json").read_text())["num_hidden_layers"] == 2
    asked = SpeculativeConfig(
        method="draft_model", model=str(tmp_path / "small"), num_speculative_tokens=3, adaptive=False
    )
    for temperature in (0.0, 1.0):
        guessed, stats = answers(folder, asked, temperature=temperature)
        assert guessed == answers(folder, None, temperature=temperature)[0]
        assert stats.num_accepted_tokens > 0


def test_the_first_layers_and_the_last_are_kept() -> None:
    assert kept_layers(30, 4) == (0, 1, 2, 29) and kept_layers(3, 1) == (2,)
    with pytest.raises(EngineError, match="1 to 2 of 3 layers, not 3"):
        kept_layers(3, 3)


def test_heads_of_another_model_or_broken_ones_are_refused(heads: Path, tmp_path: Path) -> None:
    assert load(heads, 96, VOCAB).token_ids.shape == (64,)
    with pytest.raises(EngineError, match="trained for another model"):
        load(heads, 96, VOCAB + 1)
    with pytest.raises(EngineError, match="cannot be read"):
        load(tmp_path, 96, VOCAB)
    weights = MlpWeights.fresh(SPEC, torch.arange(64), torch.zeros(64, 96))
    for wrong, reason in (
        (dataclasses.replace(weights, head=torch.zeros(63, 96)), "head has shape"),
        (dataclasses.replace(weights, token_ids=torch.arange(64) + 60), "outside the vocabulary"),
    ):
        save(tmp_path, SPEC, wrong, {})
        with pytest.raises(EngineError, match=reason):
            load(tmp_path, 96, VOCAB)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(EngineError, match="is no WarmgateMlpSpeculator"):
        load(tmp_path, 96, VOCAB)


def test_a_draft_model_with_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    make_tiny("llama", tmp_path, vocab_size=VOCAB + 3)
    with pytest.raises(EngineError, match="a vocabulary of 100 tokens, the model one of 97"):
        build(folder, **SMALL, speculative=SpeculativeConfig(method="draft_model", model=str(tmp_path)))
    with pytest.raises(EngineError, match="needs a model"):
        build(folder, **SMALL, speculative=SpeculativeConfig(method="draft_model"))


@pytest.mark.slow
def test_a_draft_model_may_be_named_as_in_the_catalogue(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARMGATE_HOME", str(tmp_path))
    asked = SpeculativeConfig(method="draft_model", model="smollm2-135m", num_speculative_tokens=3, adaptive=False)
    with pytest.raises(EngineError, match="smollm2-135m"):
        build(folder, **SMALL, speculative=asked)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2-135m").symlink_to(folder)
    guessed, stats = answers(folder, asked)
    assert guessed == answers(folder, None)[0]
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 0, "it guesses for itself"
