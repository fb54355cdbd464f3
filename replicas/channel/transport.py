"""Frames over one asyncio transport: cutting, bounds, heartbeats, the watch on the peer's silence.

Protocol classes, not StreamReader: many frames are cut from one read, and nothing is scheduled in between.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import msgspec

from replicas.channel.endpoint import set_no_delay
from replicas.channel.frames import HEADER, MAX_FRAME_BYTES, MAX_HANDSHAKE_BYTES, Frame, encode

WRITE_BUFFER_BYTES = 256 * 1024
"""Beyond this much unsent output the socket counts as not writable."""

SECOND_CHANCE_S = 0.001
"""A late timer may run before bytes that already wait in the socket are read; one more poll hears them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelOptions:
    """Times in seconds. A peer silent for `dead_after_s` is gone; `clock` is monotonic seconds."""

    heartbeat_s: float = 0.5
    dead_after_s: float = 1.5
    handshake_s: float = 5.0
    max_frame_bytes: int = MAX_FRAME_BYTES
    clock: Callable[[], float] = time.monotonic


class FrameProtocol(asyncio.Protocol):
    """One side of a connection. A subclass says what frames mean: `on_connected`, `on_frame`, `on_writable`,
    `on_lost` (exactly once), `heartbeat`, and perhaps `on_read`.

    `writable` turns False when the peer does not read; `lost_reason` is set once the connection is of no more use,
    `closed` once its socket is gone.
    """

    transport: asyncio.Transport

    def __init__(self, options: ChannelOptions) -> None:
        self.options = options
        self.max_frame_bytes = MAX_HANDSHAKE_BYTES
        self.writable = True
        self.lost_reason: str | None = None
        self.closed = asyncio.Event()
        self.num_frames_sent = 0
        self.num_frames_received = 0
        self._heard_at = options.clock()
        self._partial = bytearray()
        self._timers: list[asyncio.TimerHandle] = []

    # What a subclass fills in.

    def on_connected(self) -> None:
        raise NotImplementedError

    def on_frame(self, payload: memoryview) -> None:
        """Handles one frame; `payload` is valid during the call. msgspec errors mean a protocol error."""
        raise NotImplementedError

    def on_read(self) -> None:
        """Every whole frame of one read was handled."""

    def on_writable(self) -> None:
        """The peer reads again."""

    def on_lost(self, reason: str) -> None:
        raise NotImplementedError

    def heartbeat(self) -> Frame:
        raise NotImplementedError

    # What it uses.

    def send(self, frame: Frame) -> None:
        """Writes one frame; nothing happens once the connection is lost."""
        self.send_encoded(encode(frame))

    def send_encoded(self, frame: bytes) -> None:
        if self.lost_reason is None:
            self.num_frames_sent += 1
            self.transport.write(frame)

    def fail(self, reason: str) -> None:
        """Drops the connection now, unsent output included."""
        self._end(reason)
        self.transport.abort()

    def finish(self, reason: str) -> None:
        """Closes the connection after what was written has gone out."""
        self._end(reason)
        self.transport.close()

    def start_heartbeats(self) -> None:
        """Begins to send heartbeats and to expect signs of life; called after the handshake."""
        loop = asyncio.get_running_loop()
        self._timers = [
            loop.call_later(self.options.heartbeat_s, self._beat),
            loop.call_later(self.options.dead_after_s, self._watch),
        ]

    # asyncio.Protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass of asyncio's
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        set_no_delay(transport)
        self.on_connected()

    def data_received(self, data: bytes) -> None:
        self._heard_at = self.options.clock()
        if not self._partial:
            used = self._cut(data)  # the common case: whole frames, cut without a copy
            if used < len(data):
                self._partial += memoryview(data)[used:]
        else:
            self._partial += data
            used = self._cut(self._partial)
            del self._partial[:used]
        if used:
            self.on_read()

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        if self.lost_reason is None:
            self.on_writable()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        self._end("connection closed by the peer" if exc is None else f"connection failed: {exc}")

    # Inside.

    def _cut(self, data: bytes | bytearray) -> int:
        """Handles every whole frame in `data`; returns how many bytes they took."""
        offset, end = 0, len(data)
        with memoryview(data) as view:
            while end - offset >= HEADER.size and self.lost_reason is None:
                (num_bytes,) = HEADER.unpack_from(view, offset)
                if num_bytes > self.max_frame_bytes:
                    self.fail(f"protocol error: a frame of {num_bytes} bytes, allowed {self.max_frame_bytes}")
                    break
                start, stop = offset + HEADER.size, offset + HEADER.size + num_bytes
                if stop > end:
                    break
                self.num_frames_received += 1
                with view[start:stop] as payload:
                    self._handle(payload)
                offset = stop
        return offset if self.lost_reason is None else end

    def _handle(self, payload: memoryview) -> None:
        try:
            self.on_frame(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.fail(f"protocol error: {error}")

    def _beat(self) -> None:
        if self.writable:  # else it has unread bytes of ours, which are as good
            self.send(self.heartbeat())
        self._timers[0] = asyncio.get_running_loop().call_later(self.options.heartbeat_s, self._beat)

    def _watch(self) -> None:
        silent_s = self.options.clock() - self._heard_at
        if silent_s >= self.options.dead_after_s:
            self._timers[1] = asyncio.get_running_loop().call_later(SECOND_CHANCE_S, self._judge)
        else:
            self._watch_again(silent_s)

    def _judge(self) -> None:
        silent_s = self.options.clock() - self._heard_at
        if silent_s >= self.options.dead_after_s:
            self.fail(f"no sign of life for {silent_s:.2f} s")
        else:
            self._watch_again(silent_s)

    def _watch_again(self, silent_s: float) -> None:
        wait_s = self.options.dead_after_s - silent_s
        self._timers[1] = asyncio.get_running_loop().call_later(wait_s, self._watch)

    def _end(self, reason: str) -> None:
        if self.lost_reason is not None:
            return
        self.lost_reason = reason
        for timer in self._timers:
            timer.cancel()
        self._partial = bytearray()
        self.on_lost(reason)
