"""GGUF → a model folder in the usual format. Runs as a process of its own: `python -m ops.convert GGUF FOLDER`.

Weights are written as float32. The GGUF's are Q4_1 (a 4-bit code, and scale and offset per 32 weights); float32 holds
what they stand for, bfloat16 would round it a second time, and every engine under comparison must read the same values.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.tokenizer import load_model_files

if TYPE_CHECKING:
    import tokenizers

ROUND_TRIPS = (
    "The capital of France is Paris.",
    "1. first\n\n2. second\n    indented 2024",
    "héllo 世界 🎉 \t  two  spaces ",
    "<|im_start|>user\nhi<|im_end|>\n",
)


class ConversionError(Exception):
    """The GGUF cannot be turned into a model folder."""


def convert(gguf: Path, folder: Path) -> None:
    """Writes config, generation config, tokenizer, chat template and safetensors, then reads them back.

    Raises ConversionError when what was written is not the model that was read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.config._name_or_path = ""
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    _split_digits(folder / "tokenizer.json", _pre_tokenizer_name(gguf))
    _check(folder, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def _pre_tokenizer_name(gguf: Path) -> str:
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    return "" if field is None else str(field.contents())


def _split_digits(path: Path, pre_tokenizer: str) -> None:
    """Restores what transformers 5.19 drops from a GGUF: `smollm` takes every digit by itself before anything else.

    Without it "a\\n\\n1." becomes a, \\n, \\n, 1 and not a, \\n\\n, 1, which the model never saw in training.
    """
    if pre_tokenizer != "smollm":
        raise ConversionError(f"pre-tokenizer {pre_tokenizer!r} is not known here")
    content = json.loads(path.read_text(encoding="utf-8"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _check(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    from safetensors import safe_open

    files = load_model_files(str(folder.absolute()), folder)
    check_tokenizer(files.tokenizer)
    if files.chat_template is None or not files.special.eos:
        raise ConversionError(f"no chat template or no end token: {files.chat_template=} {files.special=}")
    with safe_open(folder / "model.safetensors", framework="pt") as written:
        found = {name: tuple(written.get_slice(name).get_shape()) for name in written.keys()}  # noqa: SIM118
    lacking = [name for name, shape in shapes.items() if found.get(name) != shape and name != "lm_head.weight"]
    if lacking:
        raise ConversionError(f"tensors that were not written as read: {', '.join(lacking[:3])}")


def check_tokenizer(tokenizer: tokenizers.Tokenizer) -> None:
    """Raises ConversionError when text does not come back from its tokens."""
    for text in ROUND_TRIPS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        back = tokenizer.decode(ids, skip_special_tokens=False)
        if back != text:
            raise ConversionError(f"the tokenizer turns {text!r} into {back!r}")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
