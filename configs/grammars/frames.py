"""What the guard and its process say to each other.

length (4 bytes, little endian), msgpack: a `GrammarSource` one way, a `Verdict` the other
"""

from __future__ import annotations

import struct
from typing import IO

import msgspec

_SIZE = struct.Struct("<I")


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """`grammar`: what a grammar has become (llguidance's format), None when it was refused, then `message` says why."""

    grammar: str | None
    message: str = ""
    too_complex: bool = False


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next frame, None at the end of the stream."""
    head = stream.read(_SIZE.size)
    if len(head) < _SIZE.size:
        return None
    (size,) = _SIZE.unpack(head)
    body = stream.read(size)
    return body if len(body) == size else None


def write_frame(stream: IO[bytes], body: bytes) -> None:
    stream.write(_SIZE.pack(len(body)) + body)
    stream.flush()
