"""What PEFT checkpoints say of themselves: read as PEFT means it, refused in words where it cannot be served."""

from __future__ import annotations

import json
import re
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

import configs.lora as lora_module
from configs.lora import LoraConfig, LoraError, parse_config, read_header, read_lora, same_model

PATH = Path("adapter_config.json")
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
Q, V, UP = "model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.v_proj", "model.layers.12.mlp.up_proj"


def parsed(**changes: Any) -> LoraConfig:
    return parse_config({**PLAIN, **changes}, PATH)


def test_a_list_of_targets_names_the_ends_of_modules() -> None:
    config = parsed()
    assert config.adapts(Q) and config.adapts(V) and not config.adapts(UP)
    assert not config.adapts("model.layers.3.self_attn.my_q_proj")
    assert parsed(target_modules=[Q]).adapts(Q)


@pytest.mark.parametrize("value", ["all-linear", "All-Linear", ["all-linear"]])
def test_all_linear_is_every_module_but_those_excluded(value: Any) -> None:
    config = parsed(target_modules=value, exclude_modules=["up_proj"])
    assert config.adapts(Q) and not config.adapts(UP)


def test_a_pattern_must_match_the_whole_name() -> None:
    config = parsed(target_modules=r".*\.self_attn\.(q|k)_proj")
    assert config.adapts(Q) and not config.adapts(V) and not config.adapts(UP)
    assert not parsed(target_modules=r"q_proj").adapts(Q)
    assert parsed(target_modules=r"model\.layers\.(3|4)\..*q_proj|nothing").adapts(Q)


def test_layers_to_transform_choose_among_listed_targets_only() -> None:
    assert parsed(layers_to_transform=[1, 3]).adapts(Q)
    assert not parsed(layers_to_transform=4).adapts(Q)
    assert parsed(layers_to_transform=[3], layers_pattern="layers").adapts(Q)
    assert not parsed(layers_to_transform=[3], layers_pattern=["blocks"]).adapts(Q)


def test_ranks_and_scaling_follow_their_patterns() -> None:
    config = parsed(rank_pattern={r"layers\.3\..*q_proj": 32, "v_proj": 4}, alpha_pattern={"v_proj": 10})
    assert (config.rank_of(Q), config.rank_of(V), config.rank_of(UP), config.max_rank) == (32, 4, 8, 32)
    assert (config.scaling_of(Q), config.scaling_of(V)) == (16 / 32, 10 / 4)
    assert parsed(use_rslora=True, r=16).scaling_of(Q) == 16 / 4
    assert parsed(rank_pattern={"proj": 3}).rank_of(Q) == 8, "a pattern must reach back to a dot"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "DoRA cannot be served"),
        ({"modules_to_save": ["lm_head"]}, r"whole modules .* \(modules_to_save\) cannot be served"),
        ({"bias": "lora_only"}, "bias is 'lora_only': only adapters with bias none"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3': only LORA"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"it adapts the output layer \(lm_head\)"),
        ({"target_modules": r".*embed_tokens|.*q_proj"}, "it adapts the token embeddings"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": None}, "target_modules is empty"),
        ({"target_modules": {"q": 1}}, "must be a list of names"),
        ({"target_modules": "("}, r"'.*\(.*' is no pattern"),
        ({"rank_pattern": {"[": 4}}, "is no pattern"),
        ({"r": 0}, "r must be 1 to 512, got 0"),
        ({"r": 513}, "r must be 1 to 512, got 513"),
        ({"r": "8"}, "r must be 1 to 512, got '8'"),
        ({"rank_pattern": {"q_proj": True}}, r"rank_pattern\[q_proj\] must be 1 to 512"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number, got nan"),
        ({"alpha_pattern": {"q_proj": "big"}}, r"alpha_pattern\[q_proj\] must be a number"),
        ({"alpha_pattern": [1]}, "alpha_pattern must be an object"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be a list of numbers"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base model's own weights"),
        ({"trainable_token_indices": [1]}, "changed token embeddings"),
        ({"target_parameters": ["mlp.experts"]}, "adapted parameters"),
        ({"layer_replication": [[0, 2]]}, "replicated layers"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LoraError, match=words) as caught:
        parsed(**changes)
    assert "adapter_config.json" in str(caught.value)


def test_what_makes_no_difference_is_not_looked_at() -> None:
    config = parsed(
        fan_in_fan_out=True, lora_dropout=0.1, inference_mode=True, peft_version="9", loftq_config={}, bias="none",
        init_lora_weights="gaussian", megatron_core="megatron.core", qalora_group_size=16, unheard_of="x",
    )  # fmt: skip
    assert config == parsed()


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(LoraError, match=f"lacks '{key}'"):
        parse_config({k: v for k, v in PLAIN.items() if k != key}, PATH)


def test_a_pattern_that_never_ends_is_given_up() -> None:
    config = LoraConfig(8, 16.0, r"(a|aa)+$")
    began = time.monotonic()
    with pytest.raises(LoraError, match="takes too long"):
        config.adapts("a" * 60 + "b")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("name", "known", "same"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "/models/smollm2-135m-instruct/", True),
        ("meta-llama/Llama-3.1-8B", "models--meta-llama--Llama-3.1-8B", True),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", False),
    ],
)
def test_names_agree_but_for_folders_case_and_punctuation(name: str, known: str, same: bool) -> None:
    assert same_model(name, known) is same


def write(folder: Path, header: object, num_bytes: int = 64, **changes: Any) -> Path:
    """A checkpoint whose weights are `num_bytes` of nothing behind a header."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **changes}))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_bytes))
    return folder


HEADER = {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}


def test_a_header_tells_of_every_tensor(tmp_path: Path) -> None:
    files = read_lora(write(tmp_path, HEADER))
    assert {name: (t.dtype, t.shape) for name, t in files.tensors.items()} == {"a": ("F32", (4, 4))}
    assert files.num_bytes == files.weights.stat().st_size


def test_the_digest_follows_weights_and_meaning_only(tmp_path: Path) -> None:
    first = read_lora(write(tmp_path / "a", HEADER)).digest()
    assert read_lora(write(tmp_path / "b", HEADER, peft_version="other")).digest() == first
    assert read_lora(write(tmp_path / "c", HEADER, lora_alpha=8)).digest() != first
    changed = write(tmp_path / "d", HEADER)
    weights = changed / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert read_lora(changed).digest() != first


@pytest.mark.parametrize(
    ("header", "num_bytes", "words"),
    [
        (HEADER, 63, "cut off or damaged"),
        (HEADER, 65, "cut off or damaged"),
        (b"{", 64, "cannot be read: JSONDecodeError"),
        (b"[]", 64, "cannot be read: AttributeError"),
        ({"a": {"dtype": "F32"}}, 0, "cannot be read: KeyError"),
        ({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 64]}}, 64, "cannot be read: ValueError"),
    ],
)
def test_a_damaged_file_is_refused(header: object, num_bytes: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=words):
        read_lora(write(tmp_path, header, num_bytes))


def test_a_header_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(LoraError, match="no safetensors file: a header of 1099511627776 bytes"):
        read_header(path)


@given(
    st.sampled_from(["q_proj", "proj", "layers.1.mlp.up_proj", "layers.11.mlp.up_proj", "l.yers.1.mlp", "up.proj", ".",
                     "mlp.", r"\d+.mlp.up_proj", "(q|k)_proj", "model.layers.1.mlp.up_proj", "up_projection"]),
    st.sampled_from(["q_proj", "up_proj", "model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "x.l.yers.1.mlp",
                     "model.k_proj", "mlp.", "model.layers.1.mlp"]),
)  # fmt: skip
def test_ends_of_names_match_as_peft_s_patterns_do(key: str, module: str) -> None:
    config = parsed(rank_pattern={key: 3})
    assert (config.rank_of(module) == 3) == (re.match(rf"(.*\.)?({key})$", module) is not None)


def test_a_pattern_for_every_module_is_compiled_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"model.layers.{layer}.mlp.{part}_proj" for layer in range(10) for part in ("up", "down")]
    config = parsed(rank_pattern={name: 1 + i for i, name in enumerate(names)})
    compiled: list[str] = []
    compile_pattern = lora_module._compiled

    def counted(pattern: str) -> regex.Pattern[str]:
        compiled.append(pattern)
        return compile_pattern(pattern)

    monkeypatch.setattr(lora_module, "_compiled", counted)
    for _ in range(2):
        assert [config.rank_of(name) for name in names] == list(range(1, 21))
    assert len(compiled) == 20


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path, HEADER)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(LoraError, match=r"adapter_model\.bin cannot be served: save it as safetensors"):
        read_lora(folder)


def test_a_folder_without_a_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"adapter_config\.json is missing"):
        read_lora(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(LoraError, match="is not a JSON object"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    ("header", "config"),
    [
        ('{"x": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}', {}),
        ('{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}', {}),
        ("{}", {"lora_alpha": 10**400}),
        ("{}", {"target_modules": "(" * 5000}),
        ("{}", {"rank_pattern": {"\ud800" * 5000: 0}}),
    ],
)
def test_whatever_a_stranger_writes_is_an_error_of_ours_and_short(
    header: str, config: dict[str, Any], tmp_path: Path
) -> None:
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**plain, **config}))
    raw = header.encode()
    (tmp_path / "adapter_model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"0000")
    with pytest.raises(LoraError) as error:
        read_lora(tmp_path)
    assert len(str(error.value)) <= 600 and str(error.value).encode()


@pytest.mark.parametrize(
    ("name", "known", "same"),
    [
        ("Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-32B-Instruct-AWQ", True),
        ("meta-llama/Llama-3.1-8B", "me/llama-3.1-8b-quantized.w8a8", True),
        ("org/m", "org/m-GPTQ-Int4", True),
        ("org/awq", "org/gptq", False),
        ("org/m-7b", "org/m-8b-AWQ", False),
    ],
)
def test_adapters_of_a_model_fit_its_quantised_twins(name: str, known: str, same: bool) -> None:
    assert same_model(name, known) is same
