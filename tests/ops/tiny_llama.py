"""Two random layers that speak in bytes: a model folder that engines and commands take like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from configs.tokenizer import SIM_CHAT_TEMPLATE, load_model_files


def write_tiny_llama(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=259,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=257,
        initializer_range=0.2,
        **{**sizes, **changes},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_model_files("sim:bytes", folder).tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, "chat_template": SIM_CHAT_TEMPLATE}))
    return folder
