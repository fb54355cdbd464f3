"""Model files as text goes in and out: `sim:bytes`, folders, what is missing or broken."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.runtime import home_dir
from configs.tokenizer import ModelFiles, find_model, load_model_files

SIM = load_model_files("sim:bytes", Path("/nowhere"))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_sim_tokens_are_the_bytes_of_the_text(text: str) -> None:
    ids = SIM.tokenizer.encode(text, add_special_tokens=False).ids
    if "<|" not in text:
        assert ids == list(text.encode())
    assert SIM.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_sim_specials_are_single_tokens_and_render_in_its_template() -> None:
    assert SIM.path is None
    assert SIM.vocab_size == 259
    assert (SIM.special.bos, SIM.special.eos) == (256, (257,))
    assert SIM.chat_template is not None
    text = jinja2.Template(SIM.chat_template).render(
        messages=[{"role": "user", "content": "hi"}], add_generation_prompt=True
    )
    ids = SIM.tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == [256, *b"user\nhi", 257, *b"\n", 256, *b"assistant\n"]


def folder(path: Path, **files: Any) -> Path:
    """A model folder around the sim tokenizer; keyword arguments replace or, when None, leave out files."""
    content: dict[str, Any] = {
        "config.json": {"vocab_size": 300, "max_position_embeddings": 512, "eos_token_id": 257},
        "tokenizer_config.json": {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>"},
        "generation_config.json": {"eos_token_id": [258, 257]},
        "tokenizer.json": json.loads(SIM.tokenizer.to_str()),
        "model.safetensors": {},
    }
    content |= {name.replace("__", "."): value for name, value in files.items()}
    path.mkdir(parents=True)
    for name, value in content.items():
        if value is not None:
            (path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def load(path: Path) -> ModelFiles:
    return load_model_files(str(path), path)


def test_a_folder_gives_limits_and_every_end_token(tmp_path: Path) -> None:
    files = load(folder(tmp_path / "m"))
    assert files.path == tmp_path / "m"
    assert files.special.eos == (258, 257)
    assert (files.special.bos, files.special.bos_token, files.special.eos_token) == (256, "<|im_start|>", "<|im_end|>")
    assert (files.vocab_size, files.max_model_len, files.chat_template) == (300, 512, None)


@pytest.mark.parametrize(
    ("tokenizer_config", "jinja", "expected"),
    [
        ({"chat_template": "inside"}, None, "inside"),
        ({"chat_template": "inside"}, "own file", "own file"),
        ({"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]}, None, "d"),
        ({}, None, None),
    ],
)
def test_chat_template_is_found_where_it_may_be(
    tokenizer_config: dict[str, Any], jinja: str | None, expected: str | None, tmp_path: Path
) -> None:
    path = folder(tmp_path / "m", tokenizer_config__json=tokenizer_config, chat_template__jinja=jinja)
    assert load(path).chat_template == expected


def test_a_model_with_vision_has_its_sizes_in_the_text_config(tmp_path: Path) -> None:
    config = {"text_config": {"vocab_size": 1000, "max_position_embeddings": 64, "eos_token_id": 5}}
    files = load(folder(tmp_path / "m", config__json=config, generation_config__json=None))
    assert (files.vocab_size, files.max_model_len, files.special.eos) == (1000, 64, (5, 257))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config__json": None}, "has no config.json; give a folder with"),
        ({"config__json": None, "tokenizer__json": None}, "has no config.json and no tokenizer.json"),
        ({"model__safetensors": None}, r"has no \*\.safetensors and no \*\.gguf file"),
        ({"config__json": "{"}, "cannot read .*config.json"),
        ({"config__json": "[]"}, "expected an object, got list"),
        ({"tokenizer__json": "{}"}, "cannot read .*tokenizer.json"),
    ],
)
def test_a_broken_folder_is_refused_in_one_line(files: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load(folder(tmp_path / "m", **files))
    assert "\n" not in str(caught.value)


def test_a_gguf_takes_the_place_of_safetensors(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", model__safetensors=None)
    (path / "model.gguf").write_bytes(b"")
    assert load(path).path == path


def test_catalogue_name_and_hub_id_share_a_folder(tmp_path: Path) -> None:
    path = folder(tmp_path / "models" / "smollm2-135m")
    assert find_model("smollm2-135m", tmp_path) == path
    assert find_model("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path) == path
    other = folder(tmp_path / "models" / "org--name")
    assert find_model("org/name", tmp_path) == other


@pytest.mark.model
def test_smollm2_takes_digits_apart_before_anything_else() -> None:
    files = load_model_files("smollm2-135m", home_dir(os.environ))
    tokens = files.tokenizer.encode("list:\n\n1. a in 2024", add_special_tokens=False).tokens
    assert tokens == ["list", ":", "ĊĊ", "1", ".", "Ġa", "Ġin", "Ġ", "2", "0", "2", "4"]
    assert files.special.eos == (2,)
    assert (files.vocab_size, files.max_model_len) == (49152, 8192)
    assert files.chat_template is not None and "<|im_start|>" in files.chat_template
