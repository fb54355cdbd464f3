"""What there is to know about the way a family of models writes tool calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol, TypeAlias

from gateway.api.pieces import Reader
from gateway.api.tools.declared import ToolUse

Spell: TypeAlias = Callable[[str], str]
"""A marker as Lark writes it: a string, or the special token that it is in this tokenizer."""

TEXT = r"/(.|\n)*/"

MAX_OPENING_CHARS = 256
"""Of a call's opening; what has not become one by then is text."""


@dataclass(frozen=True, slots=True)
class CallRules:
    """Lark rules for calls: `calls` is at least one; `lead` is text up to and with the first marker, `rest` what
    follows it to the end of the call. Bare formats have no lead. `schemas` are the JSON that rules refer to."""

    rules: tuple[str, ...]
    schemas: dict[str, Any]
    has_lead: bool = True


class ToolFormat(Protocol):
    """One family's way. `markers` are what must be seen in the text, special tokens or not."""

    @property
    def markers(self) -> tuple[str, ...]: ...

    def reader(self, use: ToolUse, new_id: Callable[[], str]) -> Reader: ...

    def spelled(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Calls (name, arguments) as the model would write them."""
        ...

    def rules(self, use: ToolUse, spell: Spell) -> CallRules: ...

    def call_id(self, random: Random) -> str:
        """An id that the family's templates take back."""
        ...


def openai_id(random: Random) -> str:
    return f"call_{random.getrandbits(96):024x}"


def lead_rule(marker: str) -> str:
    """Text up to a marker as `Spell` wrote it. A special token cannot be part of text; a string ends it lazily."""
    return f"lead[lazy]: {TEXT} {marker}" if marker.startswith('"') else f"lead: {TEXT} {marker}"


def any_of(rules: Sequence[str]) -> str:
    return " | ".join(rules)
