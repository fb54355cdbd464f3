"""What the gateway and the replicas read of a model folder besides its weights: tokenizer, chat template, limits.

config.json             vocab_size, max_position_embeddings, eos_token_id
tokenizer.json          the Rust tokenizer
tokenizer_config.json   bos and eos tokens, chat_template
chat_template.jinja     wins over the one in tokenizer_config.json
generation_config.json  eos_token_id, often more than one
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.catalogue import SIM_BYTES, entry_for, model_dir
from configs.errors import ConfigError

if TYPE_CHECKING:
    import tokenizers

SIM_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids, and the texts that chat templates name. `eos` holds every id that ends an answer, the main one first."""

    bos: int | None
    eos: tuple[int, ...]
    bos_token: str | None = None
    eos_token: str | None = None


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model as text goes in and out of it. `path` is None for `sim:bytes`, which has no files.

    `vocab_size`: rows of the model's embedding, at least the tokenizer's size. `max_model_len`: the context the model
    was made for, None when its files do not say.
    """

    path: Path | None
    tokenizer: tokenizers.Tokenizer
    chat_template: str | None
    special: SpecialTokens
    vocab_size: int
    max_model_len: int | None


def load_model_files(source: str, home: Path) -> ModelFiles:
    """The files of a catalogue name, local folder or hub id; of `sim:bytes` a tokenizer made in memory.

    Raises ConfigError when they are not there (it names the command that gets them) or cannot be read.
    """
    if source == SIM_BYTES:
        return _sim_bytes()
    path = find_model(source, home)
    tokenizer = _read_tokenizer(path / "tokenizer.json")
    config = _read_json(path / "config.json")
    tokenizer_config = _read_optional(path / "tokenizer_config.json")
    text_config = config.get("text_config", config)
    max_len = text_config.get("max_position_embeddings")
    return ModelFiles(
        path=path,
        tokenizer=tokenizer,
        chat_template=_chat_template(path, tokenizer_config),
        special=_special_tokens(path, tokenizer, text_config, tokenizer_config),
        vocab_size=max(int(text_config.get("vocab_size", 0)), tokenizer.get_vocab_size()),
        max_model_len=None if max_len is None else int(max_len),
    )


def find_model(source: str, home: Path) -> Path:
    """The folder of a source. Raises ConfigError when it is not there or not a model's."""
    path = model_dir(source, home)
    if not path.is_dir():
        raise ConfigError(f"model {source!r} is not at {path}; {_advice(source)}")
    lacking = [name for name in ("config.json", "tokenizer.json") if not (path / name).is_file()]
    if lacking:
        raise ConfigError(f"model {source!r}: {path} has no {' and no '.join(lacking)}; {_advice(source)}")
    if not any(next(path.glob(pattern), None) for pattern in ("*.safetensors", "*.gguf")):
        raise ConfigError(f"model {source!r}: {path} has no *.safetensors and no *.gguf file; {_advice(source)}")
    return path


def _advice(source: str) -> str:
    if source.startswith((".", "/", "~")):
        return "give a folder with config.json, tokenizer.json and *.safetensors or a *.gguf"
    if entry_for(source) or source.count("/") == 1:
        return f"run: warmgate models pull {source}"
    return "no such name in the catalogue; see: warmgate models list"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"cannot read {path}: expected an object, got {type(value).__name__}")
    return value


def _read_optional(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.is_file() else {}


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    import tokenizers  # slow to load, and the command line needs this module for its help alone

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ConfigError(f"cannot read {path}: {error}") from error


def _chat_template(path: Path, tokenizer_config: dict[str, Any]) -> str | None:
    own_file = path / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _special_tokens(
    path: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any], tokenizer_config: dict[str, Any]
) -> SpecialTokens:
    generation = _read_optional(path / "generation_config.json")
    bos_token, eos_token = (_token_text(tokenizer_config.get(key)) for key in ("bos_token", "eos_token"))
    bos = config.get("bos_token_id") if bos_token is None else tokenizer.token_to_id(bos_token)
    named = None if eos_token is None else tokenizer.token_to_id(eos_token)
    eos = _ids([generation.get("eos_token_id"), config.get("eos_token_id"), named])
    return SpecialTokens(
        bos=bos,
        eos=eos,
        bos_token=bos_token if bos is None or bos_token is not None else tokenizer.id_to_token(bos),
        eos_token=eos_token if eos_token is not None or not eos else tokenizer.id_to_token(eos[0]),
    )


def _token_text(value: str | dict[str, Any] | None) -> str | None:
    """A token in tokenizer_config.json is a string or an object with `content`."""
    return value.get("content") if isinstance(value, dict) else value


def _ids(found: Iterable[int | list[int] | None]) -> tuple[int, ...]:
    """All ids, first come first, each once."""
    ids: dict[int, None] = {}
    for value in found:
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None:
                ids[int(token_id)] = None
    return tuple(ids)


def _sim_bytes() -> ModelFiles:
    """Ids 0..255 are bytes, then <|im_start|> (bos), <|im_end|> (eos), <|endoftext|>."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=_byte_vocab(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return ModelFiles(
        path=None,
        tokenizer=tokenizer,
        chat_template=SIM_CHAT_TEMPLATE,
        special=SpecialTokens(bos=256, eos=(257,), bos_token=special[0], eos_token=special[1]),
        vocab_size=tokenizer.get_vocab_size(),
        max_model_len=None,
    )


def _byte_vocab() -> dict[str, int]:
    """The printable character that byte-level BPE (GPT-2) writes for each byte → the byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    stand_ins = {byte: 0x100 + i for i, byte in enumerate(others)}
    return {chr(stand_ins.get(byte, byte)): byte for byte in range(256)}
