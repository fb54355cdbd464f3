"""What single tokens are as bytes and as strings, for logprobs: right also for halves of UTF-8 characters."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer

from configs.token_bytes import byte_fallback, byte_level


class TokenText:
    """Bytes and labels of a tokenizer's tokens, remembered per id (bounded by the vocabulary)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._bytes: dict[int, bytes] = {i: token.content.encode() for i, token in added.items()}
        kinds = set(_decoder_kinds(tokenizer))
        self._byte_level = "ByteLevel" in kinds
        self._word_start = "Metaspace" in kinds or "Replace" in kinds

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def as_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for within text; empty for an id that is no token."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._tokenizer.id_to_token(token_id)
            if token is None:
                return b""
            known = self._bytes[token_id] = self._decode(token)
        return known

    def is_text(self, token_id: int) -> bool:
        """Whether the token is whole UTF-8 by itself."""
        try:
            self.as_bytes(token_id).decode()
        except UnicodeDecodeError:
            return False
        return True

    def label(self, token_id: int) -> str:
        """The token as a string; one that is not whole UTF-8 is written as OpenAI does: `\\xe2\\x96`."""
        raw = self.as_bytes(token_id)
        return raw.decode() if self.is_text(token_id) else "".join(f"\\x{byte:02x}" for byte in raw)

    def _decode(self, token: str) -> bytes:
        if self._byte_level:
            return byte_level(token)
        return byte_fallback(token) if self._word_start else token.encode()


def _decoder_kinds(tokenizer: Tokenizer) -> list[str]:
    """The types of the tokenizer's decoder, those inside a sequence included."""
    if tokenizer.decoder is None:
        return []
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    return [state["type"], *(inner["type"] for inner in state.get("decoders", ()))]
