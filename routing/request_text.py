"""What a request of any shape begins a prefix cache with, where there is no tokeniser at hand."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def prompt_bytes(arguments: Iterable[object]) -> bytes:
    """What the first argument with a prompt begins a cache with: token ids packed, or text at four bytes a token.

    Looks for `prompt_token_ids`, `messages` and `prompt`, as attribute or key; empty when there is none (a request
    body that is not read yet, for one). Two prompts that begin alike give bytes that begin alike.
    """
    for argument in arguments:
        for name in ("prompt_token_ids", "messages", "prompt"):
            value = field_of(argument, name)
            if value:
                return _packed(value)
    return b""


def _packed(value: object) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if not isinstance(value, Sequence) or not value:
        return b""
    if all(isinstance(item, int) for item in value):
        return array("I", list(value)).tobytes()
    if all(isinstance(item, str) for item in value):
        return "".join(value).encode()
    return b"".join(_message(item) for item in value)


def _message(message: object) -> bytes:
    """One chat message, with its role so that a system prompt is no user's."""
    content = field_of(message, "content")
    words = content if isinstance(content, str) else json.dumps(content, default=str)
    return f"{field_of(message, 'role')}\n{words}\n".encode()


def field_of(argument: object, name: str) -> Any:
    """A key of a mapping, an attribute of anything else; None where it is absent."""
    return argument.get(name) if isinstance(argument, Mapping) else getattr(argument, name, None)
