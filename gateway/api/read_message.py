"""A chat's answer whose text is more than text: content, thoughts and tool calls in one message."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from gateway.api.pieces import CallBegun, Content, Thought
from gateway.api.speech import Reading


def message_of(reading: Reading, text: str) -> tuple[dict[str, Any], int]:
    """The assistant's message that a whole text is, and how many calls it has."""
    reader = reading.reader()
    content, thoughts = [], []
    names: dict[int, CallBegun] = {}
    arguments: defaultdict[int, list[str]] = defaultdict(list)
    for piece in [*reader.feed(text), *reader.finish()]:
        if isinstance(piece, Content):
            content.append(piece.text)
        elif isinstance(piece, Thought):
            thoughts.append(piece.text)
        elif isinstance(piece, CallBegun):
            names[piece.index] = piece
        else:
            arguments[piece.index].append(piece.text)
    said = "".join(content)
    message: dict[str, Any] = {"role": "assistant", "content": said or (None if names else ""), "refusal": None}
    if thoughts and reading.show_thoughts:
        message["reasoning"] = message["reasoning_content"] = "".join(thoughts)
    if names:
        message["tool_calls"] = [
            {
                "id": begun.call_id,
                "type": "function",
                "function": {"name": begun.name, "arguments": "".join(arguments[index])},
            }
            for index, begun in names.items()
        ]
    return message, len(names)
