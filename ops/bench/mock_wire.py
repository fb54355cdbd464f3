"""The bytes of vLLM 0.32's HTTP answers: what `mock_vllm` reads and writes, apart from how and when it does.

One produced token is the word ` t<index>`, so a reader sees a lost, doubled or swapped chunk in the text itself.
Prompt tokens are UTF-8 bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

DONE = b"data: [DONE]\n\n"


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationBody(msgspec.Struct, frozen=True):
    """What the mock reads of a chat or completion request; every other field is ignored, as vLLM does."""

    model: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def prompts(self) -> list[list[int]]:
        """Token ids of every prompt: one for chat, one or more for completions."""
        if self.messages is not None:
            return [list("".join(f"<|{m.get('role')}|>{_content(m)}" for m in self.messages).encode())]
        prompt = self.prompt if self.prompt is not None else ""
        if isinstance(prompt, str):
            return [list(prompt.encode())]
        if all(isinstance(item, int) for item in prompt):
            return [prompt]
        return [list(item.encode()) if isinstance(item, str) else list(item) for item in prompt]


def _content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content)


def word(index: int) -> str:
    """The text of the produced token `index`."""
    return f" t{index}"


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer to write. `num_tokens` per choice; `finish_reason` of every choice.

    `num_cached`: prompt tokens from the prefix cache; None where there is none, and usage then has no details.
    """

    kind: Literal["chat", "completion"]
    response_id: str
    model: str
    created: int
    num_choices: int
    num_prompt_tokens: int
    num_tokens: int
    finish_reason: Literal["stop", "length"]
    options: StreamOptions
    num_cached: int | None = None

    def usage(self, num_tokens: int) -> dict[str, Any]:
        produced = num_tokens * self.num_choices
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "total_tokens": self.num_prompt_tokens + produced,
            "completion_tokens": produced,
            "prompt_tokens_details": None if self.num_cached is None else {"cached_tokens": self.num_cached},
        }

    def whole(self) -> bytes:
        """The body of an answer that is not streamed."""
        text = "".join(word(i) for i in range(self.num_tokens))
        end = {"logprobs": None, "finish_reason": self.finish_reason, "stop_reason": None, "token_ids": None}
        head: dict[str, Any] = {"id": self.response_id, "created": self.created, "model": self.model}
        if self.kind == "chat":
            message = {"role": "assistant", "content": text, "refusal": None}
            head["object"] = "chat.completion"
            head["choices"] = [{"index": i, "message": message} | end for i in range(self.num_choices)]
        else:
            head["object"] = "text_completion"
            head["choices"] = [{"index": i, "text": text} | end for i in range(self.num_choices)]
        return msgspec.json.encode(head | {"usage": self.usage(self.num_tokens)})

    def opening(self) -> bytes:
        """What a stream says before its first token: the role of every chat choice."""
        if self.kind != "chat":
            return b""
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        tail = self._tail(0)
        return b"".join(self._head() + str(i).encode() + b"," + delta + b"}]" + tail for i in range(self.num_choices))

    def steps(self) -> Iterator[bytes]:
        """The events of one token after another, each for all choices; the last ones carry the finish reason."""
        opening = b'"delta":{"content":"' if self.kind == "chat" else b'"text":"'
        closing = b'"},"logprobs":null,' if self.kind == "chat" else b'","logprobs":null,'
        middle = b'"finish_reason":null,"token_ids":null}]'
        last = f'"finish_reason":"{self.finish_reason}","stop_reason":null,"token_ids":null}}]'.encode()
        heads = [self._head() + str(i).encode() + b"," + opening for i in range(self.num_choices)]
        for index in range(self.num_tokens):
            end = closing + (last if index == self.num_tokens - 1 else middle) + self._tail(index + 1)
            text = word(index).encode()
            yield b"".join(itertools.chain.from_iterable((head, text, end) for head in heads))

    def ending(self) -> bytes:
        """The usage chunk, when asked for, and `[DONE]`."""
        if not self.options.include_usage:
            return DONE
        head = self._head().removesuffix(b'{"index":')
        return head + b'],"usage":' + msgspec.json.encode(self.usage(self.num_tokens)) + b"}\n\n" + DONE

    def _head(self) -> bytes:
        kind = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        fields = {"id": self.response_id, "object": kind, "created": self.created, "model": self.model}
        return b"data: " + msgspec.json.encode(fields)[:-1] + b',"choices":[{"index":'

    def _tail(self, num_tokens: int) -> bytes:
        if not self.options.continuous_usage_stats:
            return b"}\n\n"
        return b',"usage":' + msgspec.json.encode(self.usage(num_tokens)) + b"}\n\n"


def rendered(body: GenerationBody, request_id: str, default_limit: int) -> list[dict[str, Any]]:
    """What `/v1/…/render` answers: one tokens-in request per prompt (chat has exactly one)."""
    limit = body.limit if body.limit is not None else default_limit
    sampling = {"n": body.n or 1, "temperature": 1.0, "top_p": 1.0, "max_tokens": limit, "min_tokens": 0}
    return [
        {
            "request_id": f"{request_id}-{i}" if body.messages is None else request_id,
            "token_ids": token_ids,
            "features": None,
            "sampling_params": sampling,
            "model": body.model,
            "stream": bool(body.stream),
            "stream_options": body.stream_options if body.stream else None,
            "cache_salt": None,
            "priority": 0,
        }
        for i, token_ids in enumerate(body.prompts())
    ]


def error_body(status: int, kind: str, message: str, param: str | None = None) -> bytes:
    """vLLM's error object; its `code` is the status as a number."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": status}})
