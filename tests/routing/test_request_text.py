"""What a request of any shape begins a prefix cache with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from replicas.contract import pack_tokens
from routing.request_text import prompt_bytes

SYSTEM = {"role": "system", "content": "You are brief."}
HELLO = {"role": "user", "content": "Hello!"}


@dataclass
class Completion:
    prompt: Any


@dataclass
class Chat:
    messages: list[Any] = field(default_factory=list)


@dataclass
class Message:
    role: str
    content: Any


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([{"prompt": "Once upon"}], b"Once upon"),
        ([Completion("Once upon")], b"Once upon"),
        ([Completion([1, 2, 70_000])], pack_tokens([1, 2, 70_000])),
        ([{"prompt_token_ids": [5, 6], "prompt": "text"}], pack_tokens([5, 6])),
        ([Completion(["Once ", "upon"])], b"Once upon"),
        (["raw", 7, {"prompt": "later"}], b"later"),
        ([{"messages": [HELLO]}], b"user\nHello!\n"),
        ([Chat([Message("user", "Hello!")])], b"user\nHello!\n"),
        ([{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}],
         b'user\n[{"type": "text", "text": "Hi"}]\n'),
        ([], b""),
        ([object(), {"input": "no prompt"}, {"prompt": ""}, {"messages": []}], b""),
    ],
)  # fmt: skip
def test_table(arguments: list[object], expected: bytes) -> None:
    assert prompt_bytes(arguments) == expected


def test_a_conversation_begins_like_its_earlier_turns() -> None:
    answer = {"role": "assistant", "content": "Hi."}
    short = prompt_bytes([{"messages": [SYSTEM, HELLO]}])
    assert prompt_bytes([{"messages": [SYSTEM, HELLO, answer, HELLO]}]).startswith(short)


def test_a_users_words_are_not_a_system_prompts() -> None:
    assert prompt_bytes([{"messages": [SYSTEM]}]) != prompt_bytes([{"messages": [SYSTEM | {"role": "user"}]}])
