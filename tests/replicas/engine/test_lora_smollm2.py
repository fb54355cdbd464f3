"""Adapters of SmolLM2-135M as PEFT writes them, mixed in one batch, against PEFT's own merged models; a base that is
rounded to 8 bits stays near them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from replicas.contract import AdapterSpec
from tests.replicas.engine.driver import Answer, build, make_request, run
from tests.replicas.engine.test_smollm2 import model_dir
from tests.replicas.engine.tiny import oracle_logits

__all__ = ["model_dir"]  # a fixture

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

PROMPT = list(range(1000, 1040))
KINDS: dict[str, dict[str, Any]] = {
    "r4": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "r64": {"r": 64, "lora_alpha": 64, "target_modules": "all-linear", "use_rslora": True},
}
ENGINE: dict[str, Any] = {
    "dtype": "float32", "kv_cache_gib": 0.1, "max_model_len": 128, "max_num_seqs": 4, "max_adapters": 2,
    "max_lora_rank": 64, "structured": False,
}  # fmt: skip
NUM_TOKENS = 12


@dataclass(frozen=True)
class Expected:
    """The merged model's greedy answer, and its logprobs there. [num_tokens, vocab]"""

    tokens: list[int]
    logprobs: torch.Tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def expected(model_dir: Path, folder: Path) -> dict[str | None, Expected]:
    """What merged models answer; writes their adapters into `folder`."""
    peft = pytest.importorskip("peft", reason="PEFT is in the dev extra")
    torch.set_num_threads(1)
    answers: dict[str | None, Expected] = {}
    for name, kind in {None: None, **KINDS}.items():
        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        if kind is not None:
            torch.manual_seed(3)
            adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **kind))
            for weight_name, weight in adapted.named_parameters():
                if "lora_B" in weight_name:  # PEFT begins with zeros there
                    torch.nn.init.normal_(weight, std=0.02)
            adapted.save_pretrained(str(folder / str(name)))
            model = adapted.merge_and_unload()
        tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=[])
        found = tokens[0].tolist()
        raw = torch.log_softmax(oracle_logits(model, found), dim=-1)
        answers[name] = Expected(found[len(PROMPT) :], raw[len(PROMPT) - 1 : -1])
    return answers


def answers_of(model_dir: Path, folder: Path, **changes: Any) -> dict[str, Answer]:
    core = build(model_dir, **{**ENGINE, **changes}).core
    for name, kind in KINDS.items():
        core.load_adapter(AdapterSpec(adapter_id=name, path=str(folder / name), rank=kind["r"]))
    names = (None, *KINDS)
    return run(core, [make_request(str(n), PROMPT, adapter=n, max_tokens=NUM_TOKENS, logprobs=0) for n in names])


def test_a_mixed_batch_equals_peft_s_merged_models(
    model_dir: Path, folder: Path, expected: dict[str | None, Expected]
) -> None:
    answers = answers_of(model_dir, folder)
    for name, wanted in expected.items():
        answer = answers[str(name)]
        assert answer.tokens == wanted.tokens, name
        found = torch.tensor([each.logprob for each in answer.logprobs])
        own = wanted.logprobs.gather(1, torch.tensor(answer.tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(found, own, atol=2e-3, rtol=0.0)
    assert len({tuple(answer.tokens) for answer in answers.values()}) == len(expected)


def test_on_weights_rounded_to_8_bits_first_tokens_are_near_them(
    model_dir: Path, folder: Path, expected: dict[str | None, Expected]
) -> None:
    answers = answers_of(model_dir, folder, quantization="int8")
    for name, wanted in expected.items():
        first = answers[str(name)].logprobs[0]
        assert first.logprob == pytest.approx(wanted.logprobs[0, first.token_id].item(), abs=0.3), name
