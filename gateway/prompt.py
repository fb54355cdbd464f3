"""Text → token ids, once per request: chat template, tokeniser, and a cache that makes growing chats cheap.

A tokenizer first splits its text at special tokens and then treats every piece between them alone. So the ids of a
text are the ids of its segments, each cut right before a special token, joined: exactly, not approximately. The cache
keeps the ids of such segments; the next turn of a chat tokenises only what is new in it.

    <|im_start|>system…  |  <|im_end|>\\n  |  <|im_start|>user…  |  <|im_end|>\\n  |  <|im_start|>assistant\\n
    └─ segment ─────────┘  └─ segment ──┘  …

A special token qualifies for cutting only if every occurrence of its text in any text is a match of that very token
(`cut_tokens` says when).
"""

from __future__ import annotations

import asyncio
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import time
from typing import Any

from tokenizers import AddedToken, Tokenizer

from configs.tokenizer import ModelFiles
from gateway.errors import BadRequestError
from gateway.template import ChatTemplate
from gateway.tokens import TokenText
from replicas.contract import unpack_tokens

THREAD_ABOVE_CHARS = 32 * 1024
"""Longer text is tokenised off the event loop (32 KiB take about 7 ms; the Rust tokenizer lets go of the GIL)."""
MAX_CUTS = 2048
MAX_CACHE_BYTES = 64 * 1024 * 1024
_ENTRY_BYTES = 256


@dataclass(frozen=True, slots=True)
class Chat:
    """What to render: messages and tools as the template takes them, the client's template variables, how the prompt
    ends."""

    messages: list[dict[str, Any]]
    options: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False


class SegmentCache:
    """Least recently used ids of segments, bounded by bytes (4 per character counted, the worst a string can take).

    Keys carry their owner: what one tenant has sent makes nobody else's prompt measurably faster.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._ids: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._ids)

    def get(self, owner: str, segment: str) -> bytes | None:
        found = self._ids.get((owner, segment))
        if found is not None:
            self._ids.move_to_end((owner, segment))
        return found

    def put(self, owner: str, segment: str, ids: bytes) -> None:
        if (owner, segment) in self._ids or _size(segment, ids) > self.max_bytes // 4:
            return
        self._ids[owner, segment] = ids
        self.num_bytes += _size(segment, ids)
        while self.num_bytes > self.max_bytes:
            (_, oldest), oldest_ids = self._ids.popitem(last=False)
            self.num_bytes -= _size(oldest, oldest_ids)


class Prompter:
    """One model's way from text to packed token ids and back. Raises ValueError for a chat template that is not one.

    `wall` is the time of day, for templates that write the date; `observe(source, num_chars)` hears where ids came
    from: `cache` or `tokenizer`.
    """

    def __init__(
        self,
        files: ModelFiles,
        *,
        wall: Callable[[], float] = time,
        observe: Callable[[str, int], None] = lambda source, num_chars: None,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ) -> None:
        self.tokenizer: Tokenizer = files.tokenizer
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.template: ChatTemplate | None = None
        if files.chat_template is not None:
            names = {"bos_token": files.special.bos_token, "eos_token": files.special.eos_token}
            special_tokens = {name: text for name, text in names.items() if text is not None}
            self.template = ChatTemplate(files.chat_template, special_tokens, wall)
        self.vocab_size = files.vocab_size
        self.token_text = TokenText(self.tokenizer)
        self.cache = SegmentCache(max_cache_bytes)
        self._observe = observe
        self._cut_tokens = cut_tokens(self.tokenizer, files.chat_template or "")

    def render(self, chat: Chat) -> str:
        """The chat's text. Raises BadRequestError."""
        if self.template is None:
            raise BadRequestError("This model has no chat template; use /v1/completions.", param="messages",
                                  code="no_chat_template")  # fmt: skip
        text = self.template.render(
            chat.messages, chat.options, tools=chat.tools, generation_prompt=chat.add_generation_prompt
        )
        return _cut_after_final_message(text, chat.messages[-1]) if chat.continue_final_message else text

    async def chat(self, chat: Chat, owner: str) -> bytes:
        """Packed ids of a chat. `owner` separates what is cached. Raises BadRequestError."""
        return await self.chat_ids(self.render(chat), chat, owner)

    async def chat_ids(self, text: str, chat: Chat, owner: str) -> bytes:
        """Packed ids of a chat whose text is rendered already."""
        if chat.add_special_tokens:
            return (await self.texts([text], add_special_tokens=True))[0]
        return await self.rendered(text, owner)

    async def rendered(self, text: str, owner: str) -> bytes:
        """Packed ids of text that has its special tokens, segment by segment through the cache."""
        segments = self._segments(text)
        found = [self.cache.get(owner, segment) for segment in segments]
        missing = [segment for segment, ids in zip(segments, found, strict=True) if ids is None]
        num_new = sum(map(len, missing))
        self._observe("tokenizer", num_new)
        self._observe("cache", len(text) - num_new)
        if not missing:
            return b"".join(ids for ids in found if ids is not None)
        if num_new > THREAD_ABOVE_CHARS:
            fresh = await asyncio.to_thread(self._encode_all, missing, False)
        else:
            fresh = self._encode_all(missing, False)
        for segment, ids in zip(missing, fresh, strict=True):
            self.cache.put(owner, segment, ids)
        rest = iter(fresh)
        return b"".join(next(rest) if ids is None else ids for ids in found)

    async def texts(self, texts: list[str], *, add_special_tokens: bool) -> list[bytes]:
        """Packed ids of plain texts, as the tokenizer itself would give them."""
        num_chars = sum(map(len, texts))
        self._observe("tokenizer", num_chars)
        if num_chars > THREAD_ABOVE_CHARS:
            return await asyncio.to_thread(self._encode_all, texts, add_special_tokens)
        return self._encode_all(texts, add_special_tokens)

    def decode(self, packed: bytes, *, skip_special_tokens: bool) -> str:
        """Text of packed ids."""
        return str(self.tokenizer.decode(unpack_tokens(packed).tolist(), skip_special_tokens=skip_special_tokens))

    def _segments(self, text: str) -> list[str]:
        cuts = sorted(_occurrences(text, self._cut_tokens))[:MAX_CUTS]
        edges = [0, *(cut for cut in cuts if cut), len(text)]
        return [text[start:end] for start, end in pairwise(edges) if end > start]

    def _encode_all(self, texts: list[str], add_special_tokens: bool) -> list[bytes]:
        encode = self.tokenizer.encode
        return [array("I", encode(text, add_special_tokens=add_special_tokens).ids).tobytes() for text in texts]


def _size(segment: str, ids: bytes) -> int:
    return _ENTRY_BYTES + 4 * len(segment) + len(ids)


def _occurrences(text: str, tokens: Iterable[str]) -> Iterable[int]:
    for token in tokens:
        at = text.find(token)
        while at >= 0:
            yield at
            at = text.find(token, at + len(token))


def cut_tokens(tokenizer: Tokenizer, template: str) -> tuple[str, ...]:
    """Special tokens of the template at whose start a text may be cut without changing its ids.

    The tokenizer finds its added tokens leftmost first, longest first, before it does anything else, those that are
    not `normalized` in the raw text. Where one is found there can be no cut through another if (1) no other added
    token's text can overlap it, (2) it takes no white space with it, (3) its first character cannot be taken for a
    word's part by a `single_word` neighbour. Pieces between found tokens are then normalised and split alone.
    """
    added = list(tokenizer.get_added_tokens_decoder().values())
    return tuple(
        token.content
        for token in added
        if token.content in template
        and _takes_only_itself(token)
        and not any(_overlaps(token.content, other.content) for other in added)
    )


def _takes_only_itself(token: AddedToken) -> bool:
    text = token.content
    plain = not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    return plain and bool(text.strip() == text and text) and not (text[0].isalnum() or text[0] == "_")


def _overlaps(token: str, other: str) -> bool:
    """Whether an occurrence of `other` can share characters with one of `token` (itself at the same place aside)."""
    if token != other and (token in other or other in token):
        return True
    sizes = range(1, min(len(token), len(other)))
    return any(token[:n] == other[-n:] or token[-n:] == other[:n] for n in sizes)


def _cut_after_final_message(text: str, message: dict[str, Any]) -> str:
    """The text up to the end of the final message's content, so that the model goes on writing it."""
    content = message.get("content") or ""
    stripped = content.strip()
    at = text.rfind(stripped)
    if not stripped or at < 0:
        raise BadRequestError("continue_final_message: the final message has no text that the chat template keeps.",
                              param="messages")  # fmt: skip
    whole = content.lstrip()
    return text[: at + len(whole)] if text.startswith(whole, at) else text[: at + len(stripped)]
