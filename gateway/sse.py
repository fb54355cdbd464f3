"""Server-sent events as bytes: built once around the text, never by serialising a model per token."""

from __future__ import annotations

import msgspec

from gateway.errors import ApiError

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"

encode = msgspec.json.Encoder().encode
# Line breaks to str.splitlines that JSON lets stand: clients that split decoded text by it would cut an event in two.
_LINE_BREAKS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


def json_text(text: str) -> bytes:
    """Text as a JSON string that no reader of lines can break."""
    encoded = encode(text)
    return encoded if text.isascii() else one_line(encoded)


def one_line(encoded: bytes) -> bytes:
    """JSON without the characters that some readers take for the end of a line."""
    for raw, escaped in _LINE_BREAKS:
        if raw in encoded:
            encoded = encoded.replace(raw, escaped)
    return encoded


def event(payload: object) -> bytes:
    """One event of anything JSON can hold."""
    return b"data: " + one_line(encode(payload)) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The last event of a stream that broke off: OpenAI's error object, and no `[DONE]` after it."""
    return event(error.body())
