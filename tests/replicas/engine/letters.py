"""A tokenizer for tiny models: three special tokens, then a character each."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.replicas.engine.tiny import VOCAB

SPECIALS = ("<pad>", "<s>", "</s>")


def write_tokenizer(folder: Path) -> None:
    """Writes `tokenizer.json`."""
    vocab = {text: i for i, text in enumerate([*SPECIALS, *(chr(code) for code in range(0x21, 0x7F))])}
    assert len(vocab) == VOCAB
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
