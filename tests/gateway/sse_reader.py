"""Reads a stream's body as a strict client would."""

from __future__ import annotations

import json
from typing import Any


def events(body: str) -> list[Any]:
    """The data of every event, JSON decoded, `[DONE]` as it is; each is one line whatever splits lines."""
    blocks = body.split("\n\n")
    assert blocks.pop() == "", "a stream ends with the end of an event"
    for block in blocks:
        assert block.startswith("data: ")
        assert block.splitlines() == [block], "an event is one line, by every idea of a line"
    data = [block.removeprefix("data: ") for block in blocks]
    return [item if item == "[DONE]" else json.loads(item) for item in data]
