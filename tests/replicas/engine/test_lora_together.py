"""Adapters with what else an engine can do: guesses, rounded weights, a rounded cache, scores of prompts."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.schema import EngineConfig
from replicas.engine.families import read_spec
from replicas.engine.quantization.opening import open_source
from replicas.engine.quantization.source import Dequantised
from replicas.engine.self_check import reference_logits
from replicas.engine.speculative.control import Fixed
from replicas.engine.speculative.speculator import Speculator
from tests.replicas.engine.conftest import TinyModels
from tests.replicas.engine.driver import build, make_request, run
from tests.replicas.engine.lora_kit import Written, write_adapter
from tests.replicas.engine.test_lora import FAMILY, WITH_LORA, adapters, loaded, mixed, tokens
from tests.replicas.engine.test_speculative import KnowingDrafter
from tests.replicas.engine.tiny import oracle_logits, random_tokens

__all__ = ["adapters"]  # a fixture


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_guesses_do_not_change_what_adapters_say(
    sampling: dict[str, Any], tiny_model: TinyModels, adapters: dict[str, Written]
) -> None:
    """Rows of one sequence's guesses, trees of right and wrong ones, have its adapter, in batches with others'."""
    folder, _ = tiny_model(FAMILY)
    wanted = mixed(adapters, max_tokens=24, **sampling)
    plain = tokens(run(loaded(folder, adapters).core, wanted))
    core = loaded(folder, adapters).core
    drafter = KnowingDrafter(plain, random.Random(4))
    core.speculator = Speculator(drafter, Fixed(5))
    assert tokens(run(core, wanted)) == plain
    assert core.speculator.stats.num_accepted_tokens > 100 and drafter.num_moved > 10


class Merged:
    """A source of weights to which an adapter's products are added."""

    def __init__(self, source: Dequantised, deltas: Mapping[str, Tensor]) -> None:
        self._source = source
        self._deltas = {f"{name}.weight": delta for name, delta in deltas.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def get(self, name: str) -> Tensor:
        found = self._source.get(name).float()
        return found + self._deltas[name] if name in self._deltas else found


@pytest.mark.parametrize("method", ["int8", "int4", "nf4", "fp8"])
def test_rounded_weights_take_adapters_as_plain_ones_do(method: Any, tiny_model: TinyModels, tmp_path: Path) -> None:
    """What is added is not rounded: the answer is that of the rounded weights plus s B A."""
    folder, model = tiny_model("llama")
    written = write_adapter(tmp_path, model, rank=16)
    rounding: dict[str, Any] = {"quantization": method, "quantization_group_size": 32, "head_quantization": "none"}
    core = loaded(folder, {"x": written}, **rounding).core
    prompt = random_tokens(30, seed=7)
    wanted = [make_request(str(name), prompt, adapter=name, logprobs=0) for name in ("x", None)]
    answers = run(core, wanted)
    spec = read_spec(folder)
    source = Dequantised(open_source(folder, spec, EngineConfig(**rounding), True).source, spec)
    for name, deltas in (("x", written.deltas), ("None", {})):
        logits = reference_logits(Merged(source, deltas), spec, torch.device("cpu"))
        answer = answers[name]
        raw = torch.log_softmax(logits(prompt + answer.tokens, len(answer.tokens) + 1), dim=-1)
        for row, found in zip(raw, answer.logprobs, strict=False):
            assert found.logprob == pytest.approx(row[found.token_id].item(), abs=0.02), (method, name)
    assert answers["x"].tokens != answers["None"].tokens


def test_a_rounded_cache_stays_near_the_merged_model(tiny_model: TinyModels, tmp_path: Path) -> None:
    folder, model = tiny_model("llama")
    written = write_adapter(tmp_path, model, rank=16)
    prompt = random_tokens(40, seed=8)
    core = loaded(folder, {"x": written}, kv_cache_dtype="int8").core
    answer = run(core, [make_request("a", prompt, adapter="x", logprobs=0)])["a"]
    said = torch.tensor([found.logprob for found in answer.logprobs])
    merged, base = (scores(each, prompt, answer.tokens) for each in (written.merged(model), model))
    assert (said - merged).abs().max() < 0.1 < 1.0 < (said - base).abs().max()


def scores(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> Tensor:
    """Logprobs of an answer's tokens. [num_tokens]"""
    raw = torch.log_softmax(oracle_logits(model, prompt + answer), dim=-1)[len(prompt) - 1 : -1]
    return raw.gather(1, torch.tensor(answer)[:, None]).squeeze(1)


def test_prompts_are_scored_with_their_adapter(tiny_model: TinyModels, adapters: dict[str, Written]) -> None:
    folder, model = tiny_model(FAMILY)
    prompt = random_tokens(33, seed=9)
    names = ("r4", "r128", None)
    wanted = [make_request(str(name), prompt, adapter=name, prompt_logprobs=0) for name in names]
    answers = run(loaded(folder, adapters).core, wanted)
    for name in names:
        own = model if name is None else adapters[name].merged(model)
        raw = torch.log_softmax(oracle_logits(own, prompt), dim=-1)
        scores = answers[str(name)].prompt_logprobs
        assert scores is not None
        for at, found in enumerate(scores[1:]):
            assert found is not None
            assert found.logprob == pytest.approx(raw[at, prompt[at + 1]].item(), abs=2e-4)


def test_an_engine_without_adapters_holds_no_pool(tiny_model: TinyModels) -> None:
    engine = build(tiny_model(FAMILY)[0], **{**WITH_LORA, "max_adapters": 0})
    assert engine.core.adapters is None
    assert (engine.facts.max_adapters, engine.facts.adapter_pool_ranks) == (0, 0)
