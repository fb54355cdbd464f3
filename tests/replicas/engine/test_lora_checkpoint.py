"""LoRA checkpoints: what PEFT writes means here what it means there; what does not fit is refused before it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from replicas.contract import AdapterSpec, EngineError
from replicas.engine.core import EngineCore
from tests.replicas.engine.conftest import TinyModels
from tests.replicas.engine.driver import build, make_request, run
from tests.replicas.engine.lora_kit import Written, write_adapter
from tests.replicas.engine.tiny import oracle_logits, random_tokens

A = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
LORA: dict[str, Any] = {"max_adapters": 2, "max_lora_rank": 32}


@pytest.fixture
def written(tiny_model: TinyModels, tmp_path: Path) -> Written:
    return write_adapter(tmp_path / "good", tiny_model("llama")[1], rank=8)


@pytest.fixture(scope="module")
def core(tiny_model: TinyModels) -> EngineCore:
    return build(tiny_model("llama")[0], **LORA, lora_base_models=("org/Some-Other.Name",)).core


def configure(written: Written, **changes: Any) -> None:
    path = written.path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def retensor(written: Written, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = written.path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)


def with_value(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[A][3, 5] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_value(float("nan")), r"layers\.1\.self_attn\.k_proj\.lora_A\.weight has values that are no finite"),
        (with_value(float("-inf")), "has values that are no finite numbers"),
        (lambda t: t.pop(A), r"lacks .*layers\.1\.self_attn\.k_proj\.lora_A\.weight, which its configuration implies"),
        (lambda t: t.update({A: t[A][:4]}), r"has shape \(4, 96\), configuration and base model imply \(8, 96\)"),
        (lambda t: t.update({A: t[A][:, :90]}), r"has shape \(8, 90\)"),
        (lambda t: t.update({A: t[A].to(torch.int8)}), "has dtype I8"),
        (
            lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(4)}),
            "has .*lora_magnitude_vector, for which this engine has no place",
        ),
        (lambda t: t.update({A.replace("layers.1", "layers.9"): t[A]}), r"has .*layers\.9.*, for which"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[A]}), "lm_head"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None], words: str, written: Written, core: EngineCore
) -> None:
    retensor(written, change)
    with pytest.raises(EngineError, match=words):
        core.load_adapter(written.spec())
    core.adapters.check()  # type: ignore[union-attr]  # no page is lost


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 4}, r"has shape \(8, 96\), configuration and base model imply \(4, 96\)"),
        ({"target_modules": ["q_proj"]}, "for which this engine has no place"),
        ({"target_modules": ["c_attn"]}, "name no linear layer of this model: .*c_attn"),
        ({"use_dora": True}, "DoRA cannot be served"),
        ({"base_model_name_or_path": "meta-llama/Llama-3"}, "trained on 'meta-llama/Llama-3', which is none of the"),
    ],
    ids=str,
)
def test_configurations_that_do_not_fit_are_refused(
    changes: dict[str, Any], words: str, written: Written, core: EngineCore
) -> None:
    configure(written, **changes)
    with pytest.raises(EngineError, match=words):
        core.load_adapter(written.spec())


@pytest.mark.parametrize("name", ["", "tested", "/somewhere/Tested", "some-other-name"])
def test_the_base_model_may_have_any_of_its_names(name: str, written: Written, core: EngineCore) -> None:
    configure(written, base_model_name_or_path=name)
    core.load_adapter(written.spec("x@1"))
    core.unload_adapter("x@1")


def test_a_rank_beyond_what_was_said_or_allowed_is_refused(
    tiny_model: TinyModels, written: Written, core: EngineCore, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="its rank is 8, it was added with rank 4"):
        core.load_adapter(AdapterSpec(adapter_id="a@1", path=str(written.path), rank=4))
    large = write_adapter(tmp_path / "large", tiny_model("llama")[1], rank=64)
    with pytest.raises(EngineError, match=r"its rank is 64, engine\.max_lora_rank 32"):
        core.load_adapter(large.spec())


def test_a_path_is_needed(core: EngineCore) -> None:
    with pytest.raises(EngineError, match="it has no path"):
        core.load_adapter(AdapterSpec(adapter_id="a@1"))


def test_values_too_large_for_the_pool_s_type_are_refused(tiny_model: TinyModels, written: Written) -> None:
    core = build(tiny_model("llama")[0], **LORA, lora_dtype="float16").core
    retensor(written, with_value(1e6))
    with pytest.raises(EngineError, match=r"values of qkv in layer 1 are too large for torch\.float16"):
        core.load_adapter(written.spec())
    core.adapters.check()  # type: ignore[union-attr]


PEFT_KINDS: dict[str, dict[str, Any]] = {
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "all-linear": {"r": 4, "lora_alpha": 4, "target_modules": "all-linear"},
    "pattern": {"r": 8, "target_modules": r".*\.(0|2)\.(self_attn\.q_proj|mlp\.(up|down)_proj)"},
    "rank stabilised": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 8,
        "target_modules": ["q_proj", "v_proj", "gate_proj"],
        "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 24},
        "alpha_pattern": {r".*\.gate_proj": 3},
    },
    "some layers": {"r": 8, "target_modules": ["o_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "excluded": {"r": 8, "target_modules": "all-linear", "exclude_modules": ["k_proj"]},
}


@pytest.fixture(scope="module")
def peft_model(tiny_model: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """kind → what PEFT saved, and PEFT's own model with it applied (not merged)."""
    peft = pytest.importorskip("peft", reason="PEFT is in the dev extra")
    folder, _ = tiny_model("llama")

    def get(kind: str) -> tuple[Path, Any]:
        from transformers import AutoModelForCausalLM

        base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        torch.manual_seed(11)
        config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **PEFT_KINDS[kind])
        model = peft.get_peft_model(base, config).eval()
        path = tmp_path_factory.mktemp("peft")
        model.save_pretrained(path)
        return path, model

    return get


@pytest.mark.parametrize("kind", PEFT_KINDS)
def test_what_peft_saves_means_here_what_it_means_there(
    kind: str, peft_model: Callable[[str], tuple[Path, Any]], tiny_model: TinyModels
) -> None:
    path, model = peft_model(kind)
    folder, base = tiny_model("llama")
    core = build(folder, **LORA).core
    core.load_adapter(AdapterSpec(adapter_id="a@1", path=str(path), rank=32))
    prompt = random_tokens(33, seed=7)
    answer = run(core, [make_request("a", prompt, adapter="a@1", logprobs=0)])["a"]
    tokens = prompt + answer.tokens
    expected, plain = (torch.log_softmax(oracle_logits(m, tokens), dim=-1) for m in (model, base))
    at = torch.arange(len(prompt) - 1, len(tokens) - 1)
    chosen = torch.tensor(answer.tokens)
    assert torch.equal(expected[at].argmax(dim=-1), chosen)
    found = torch.tensor([logprob.logprob for logprob in answer.logprobs])
    torch.testing.assert_close(found, expected[at, chosen], atol=1e-4, rtol=1e-4)
    assert (expected - plain)[at, chosen].abs().max() > 0.01, "the adapter makes a difference to tell"
