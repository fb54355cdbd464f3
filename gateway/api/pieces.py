"""What the text of an answer is made of, for clients that want more than the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of a model that thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A tool call, its name known. `index` counts the calls of a message."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next characters of a call's arguments, a JSON object as the model writes it."""

    index: int
    text: str


Piece: TypeAlias = Content | Thought | CallBegun | CallArguments


Stage: TypeAlias = Literal["before", "inside", "after"]
"""Of the text that is to come: a thought may begin, has begun, is over."""


class Reader(Protocol):
    """Reads one answer's text as it comes. What could still become something else is held back."""

    def feed(self, text: str) -> list[Piece]:
        """What the text so far is sure to mean, beyond what was told before."""
        ...

    def finish(self) -> list[Piece]:
        """The rest, when no more text comes."""
        ...


def num_held(text: str, marker: str) -> int:
    """Characters at the end of `text` that could be the beginning of `marker`, which is not in `text` itself."""
    for size in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0
