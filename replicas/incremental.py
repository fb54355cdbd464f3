"""Token ids to text, a few at a time: never half a UTF-8 character, and in the end the same as decoding all at once."""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Protocol

import tokenizers

from configs.token_bytes import byte_fallback, byte_level

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_NUM_CONTEXT = 6
_MAX_HELD = 4
_MAX_WINDOW = 64
_SENTENCE_PIECE = ["Replace", "ByteFallback", "Fuse", "Strip"]


class Detokenizer(Protocol):
    """The text of one sequence. Text lags behind the ids while a character is incomplete."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these ids complete."""
        ...

    def flush(self) -> str:
        """What is left when no more ids come: U+FFFD for an incomplete character, as decoding all at once gives."""
        ...


class Vocabulary:
    """A tokenizer's decoding side, shared by all sequences that agree on `skip_special_tokens`.

    Byte-level BPE (GPT-2 and after: Llama 3, Qwen, SmolLM) and SentencePiece with byte fallback (Llama 2, Mistral,
    Gemma) are decoded from a table of bytes, filled as ids turn up; anything else by the tokenizer itself.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        spell = _spelling(tokenizer)
        self._table = None if spell is None else _ByteTable(tokenizer, spell, skip_special_tokens)

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """For one sequence that continues `prompt` (not empty; its last few ids will do): the text is what decoding
        both adds to decoding the prompt, so a word keeps the space in front of it."""
        if self._table is not None:
            return ByteDetokenizer(self._table)
        return PrefixDetokenizer(self._decode, prompt[-_NUM_CONTEXT:])

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


class _ByteTable(dict[int, bytes]):
    """id → bytes. `texts` has the ids whose bytes are whole characters."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, spell: Callable[[str], bytes], skip_special_tokens: bool
    ) -> None:
        super().__init__()
        self.texts: dict[int, str] = {}
        self._tokenizer = tokenizer
        self._spell = spell
        added = tokenizer.get_added_tokens_decoder()
        self._skipped = {i for i, token in added.items() if token.special} if skip_special_tokens else set()

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped else self._tokenizer.id_to_token(token_id)
        data = b"" if token is None else self._spell(token)
        self[token_id] = data
        with contextlib.suppress(UnicodeDecodeError):
            self.texts[token_id] = data.decode()
        return data


class ByteDetokenizer:
    """Concatenates bytes and decodes them as they become whole characters.

    For bytes that are no UTF-8 the byte-fallback decoder gives up the whole run of byte tokens around them, when it
    sees them at once; here the characters before them stay.
    """

    __slots__ = ("_decoder", "_is_partial", "_table", "_texts")

    def __init__(self, table: _ByteTable) -> None:
        self._table = table
        self._texts = table.texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_partial = False

    def push(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1 and not self._is_partial:
            text = self._texts.get(token_ids[0])
            if text is not None:
                return text
        table = self._table
        text = self._decoder.decode(b"".join([table[token_id] for token_id in token_ids]))
        self._is_partial = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        if not self._is_partial:
            return ""
        self._is_partial = False
        return self._decoder.decode(b"", final=True)


class PrefixDetokenizer:
    """Decodes a window of the last ids twice, without and with the new ones; the difference is the new text.

    The window keeps what decoders look at (spaces between words, say) at O(1) a token, as in Text Generation
    Inference and vLLM. Text that ends in U+FFFD waits, for at most as many ids as a character has bytes.
    """

    __slots__ = ("_decode", "_num_held", "_num_read", "_read_text", "_window")

    def __init__(self, decode: Decode, context: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(context)
        self._read_text = decode(self._window)
        if self._read_text.endswith(REPLACEMENT):
            self._window.clear()
            self._read_text = ""
        self._num_read = len(self._window)
        self._num_held = 0

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push(token_id) for token_id in token_ids])

    def flush(self) -> str:
        text = self._new_text(self._decode(self._window))
        self._advance()
        return text

    def _push(self, token_id: int) -> str:
        self._window.append(token_id)
        whole = self._decode(self._window)
        is_partial = whole.endswith(REPLACEMENT) and len(whole) > len(self._read_text)
        if is_partial and self._num_held < _MAX_HELD - 1:
            self._num_held += 1
            return ""
        if len(whole) <= len(self._read_text) and len(self._window) < _MAX_WINDOW:
            return ""  # nothing to see of this token yet: a skipped special one, or a space to come
        text = self._new_text(whole)
        self._advance()
        return text

    def _new_text(self, whole: str) -> str:
        if whole.startswith(self._read_text):
            return whole[len(self._read_text) :]
        # What was shown cannot be taken back (a decoder that cleans up across tokens): the new ids by themselves.
        return self._decode(self._window[self._num_read :])

    def _advance(self) -> None:
        """What was read before leaves the window; what is read now stays as context."""
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        self._read_text = self._decode(self._window)
        self._num_held = 0


class Decode(Protocol):
    def __call__(self, token_ids: Sequence[int]) -> str: ...


def _spelling(tokenizer: tokenizers.Tokenizer) -> Callable[[str], bytes] | None:
    """How this tokenizer's tokens spell bytes; None when decoding is more than putting bytes together."""
    decoder = json.loads(tokenizer.to_str())["decoder"] or {"type": "none"}
    if decoder["type"] == "ByteLevel":
        return byte_level
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else []
    # `Strip` takes the space in front of a whole text away: that is the prompt's.
    if [step["type"] for step in steps] in (_SENTENCE_PIECE, _SENTENCE_PIECE[:-1]) and (
        (steps[0]["pattern"], steps[0]["content"]) == ({"String": "▁"}, " ")
    ):
        return byte_fallback
    return None
