"""The frames of the channel: msgpack arrays behind a length, never pickle.

    | length: uint32 big endian | [tag, field, …] msgpack |

    ingress                                   replica
       │  ◄──────────── Challenge(version, nonce)  │     bounded to MAX_HANDSHAKE_BYTES,
       │  Hello(version, nonce, proof) ──────────► │     all within one timeout
       │  ◄─── Welcome(facts, stats, proof) or Refusal
       │  Open · Abort · Pause · Resume · Ping ──► │
       │  ◄───────────────────────── Step · Beat   │

Fields may be added at the end of a frame without a new version (older readers skip them); anything else raises
`VERSION`. The handshake frames keep their leading fields for ever, so that a mismatch can be told as one.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from replicas.contract import EngineFacts, EngineStats, GenerateRequest, StepDelta

VERSION = 1
MAGIC = "warmgate-channel"
MAX_HANDSHAKE_BYTES = 4096
"""What a side that has not proved itself may make us hold."""
MAX_WELCOME_BYTES = 256 * 1024
"""The replica's answer carries its facts; the ingress asked for it."""
MAX_FRAME_BYTES = 64 * 1024 * 1024

HEADER = struct.Struct(">I")

Nonce: TypeAlias = Annotated[bytes, Meta(min_length=32, max_length=32)]
PeerId: TypeAlias = Annotated[str, Meta(min_length=1, max_length=256)]
RefusalCode: TypeAlias = Literal["authentication_failed", "version_mismatch", "protocol_error", "busy"]


class Challenge(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The replica's first word."""

    magic: str
    version: int
    nonce: Nonce


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The ingress names itself and proves that it knows the secret."""

    version: int
    ingress_id: PeerId
    nonce: Nonce
    proof: bytes


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The replica proves the same, and says what its engine is, and which start of the replica this is
    (`routing.registry.Member.start_id`; empty: it does not say)."""

    replica_id: PeerId
    proof: bytes
    facts: EngineFacts
    stats: EngineStats
    start_id: str = ""


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Why there will be no link; the connection closes after it."""

    code: RefusalCode
    message: str


class Open(msgspec.Struct, frozen=True, array_like=True, tag=16):
    """A request: id, attempt, fair tag, deadline, salt and adapter are in it."""

    request: GenerateRequest


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=17):
    """The ingress no longer wants this attempt; no terminal delta will be sent."""

    request_id: str
    attempt: int


class Pause(msgspec.Struct, frozen=True, array_like=True, tag=18):
    """This stream's reader is slow: merge its deltas until `Resume`."""

    request_id: str
    attempt: int


class Resume(msgspec.Struct, frozen=True, array_like=True, tag=19):
    """Send what was merged, then go on as before."""

    request_id: str
    attempt: int


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=20):
    """The ingress lives. `adapters`: requests for them will come soon."""

    adapters: tuple[str, ...] = ()


class Step(msgspec.Struct, frozen=True, array_like=True, tag=32):
    """Every delta of one engine step for this ingress, and the replica's load after it; the rest as in `Beat`."""

    stats: EngineStats
    deltas: list[StepDelta]
    num_opened: int | None = None
    turn: int = 0


class Beat(msgspec.Struct, frozen=True, array_like=True, tag=33):
    """The replica lives, and this is its load, with the first `num_opened` requests of this connection in it.

    `turn`: how many other ingresses may use first what it wants.
    """

    stats: EngineStats
    num_opened: int | None = None
    turn: int = 0


IngressFrame: TypeAlias = Open | Abort | Pause | Resume | Ping
ReplicaFrame: TypeAlias = Step | Beat
Frame: TypeAlias = Challenge | Hello | Welcome | Refusal | IngressFrame | ReplicaFrame

_encoder = msgspec.msgpack.Encoder()

decode_hello = msgspec.msgpack.Decoder(Hello).decode
decode_greeting = msgspec.msgpack.Decoder(Challenge | Welcome | Refusal).decode
decode_ingress = msgspec.msgpack.Decoder(IngressFrame).decode
decode_replica = msgspec.msgpack.Decoder(ReplicaFrame).decode


def encode(frame: Frame) -> bytes:
    """The frame as it goes over the wire, length included."""
    payload = _encoder.encode(frame)
    return HEADER.pack(len(payload)) + payload
