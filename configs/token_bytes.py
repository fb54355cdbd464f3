"""How tokens spell bytes in the two usual kinds of vocabulary."""

from __future__ import annotations

import contextlib


def byte_fallback(token: str) -> bytes:
    """SentencePiece (Llama 2, Mistral, Gemma): ▁ for a space, <0x0A> for a byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        with contextlib.suppress(ValueError):
            return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def byte_level(token: str) -> bytes:
    """Byte-level BPE (GPT-2, Llama 3, Qwen) writes each byte as one printable character; an added token may be written
    plainly."""
    try:
        return bytes([_BYTES[char] for char in token])
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
