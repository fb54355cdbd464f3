"""A random model of two layers that speaks in bytes, complete with tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from configs.tokenizer import SIM_CHAT_TEMPLATE, load_model_files


def write_bytes_model(folder: Path) -> Path:
    """Its folder."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=257,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_model_files("sim:bytes", folder).tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, "chat_template": SIM_CHAT_TEMPLATE}))
    return folder
