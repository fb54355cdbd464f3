"""Reads vLLM's KV events from its publisher's socket: without waiting, and asking again for what was missed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec
import zmq

from replicas.contract import KvEvent
from replicas.vllm.kv_events import Batch, KvTranslation

logger = logging.getLogger(__name__)

MAX_BATCHES = 64
"""Messages taken at once: those of 64 steps."""

REPLAY_S = 1.0
_LAST = b"\xff" * 8


class KvSubscription:
    """Subscribes before the engine starts, so that nothing is missed. Both endpoints are Unix sockets in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder / 'kv'}"
        self.replay_endpoint = f"ipc://{folder / 'kv-replay'}"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(self.endpoint)
        self._decoder = msgspec.msgpack.Decoder(Batch)
        self._translation: KvTranslation | None = None
        self._next = 0

    def begin(self, block_size: int) -> None:
        """From now on blocks have this size. What came before is not lost."""
        self._translation = KvTranslation(block_size)

    @property
    def seq(self) -> int:
        """The number of the next event."""
        return 0 if self._translation is None else self._translation.seq

    def take(self) -> list[KvEvent]:
        """What has come since, at most `MAX_BATCHES` messages of it."""
        if self._translation is None:
            return []
        found: list[KvEvent] = []
        for _ in range(MAX_BATCHES):
            try:
                _, number, payload = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            seq = int.from_bytes(number, "big")
            if seq < self._next:
                continue  # known from a replay
            if seq > self._next:
                found += self._catch_up(self._translation, seq)
            found += self._translated(self._translation, payload)
            self._next = seq + 1
        return found

    def close(self) -> None:
        """Idempotent."""
        self._socket.close(0)
        self._context.destroy(0)

    def _translated(self, translation: KvTranslation, payload: bytes) -> list[KvEvent]:
        try:
            return translation.translate(self._decoder.decode(payload).events)
        except msgspec.MsgspecError as error:
            logger.warning("a KV event of vLLM's cannot be read, beginning anew: %s", error)
            return translation.lost()

    def _catch_up(self, translation: KvTranslation, until: int) -> list[KvEvent]:
        """Messages from the next to the one before `until`; nothing is held any more when one is missing for good."""
        found: list[KvEvent] = []
        for seq, payload in self._replay(self._next):
            if seq != self._next or seq >= until:
                break
            found += self._translated(translation, payload)
            self._next += 1
        if self._next == until:
            return found
        logger.warning("KV events %d to %d of vLLM's are missing: beginning anew", self._next, until - 1)
        return found + translation.lost()

    def _replay(self, start: int) -> Iterator[tuple[int, bytes]]:
        """(number, payload) of what the publisher still has from `start` on."""
        socket = self._context.socket(zmq.DEALER)
        try:
            socket.setsockopt(zmq.RCVTIMEO, int(REPLAY_S * 1000))
            socket.connect(self.replay_endpoint)
            socket.send_multipart([b"", start.to_bytes(8, "big")])
            while True:
                *_, number, payload = socket.recv_multipart()
                if number == _LAST:
                    return
                yield int.from_bytes(number, "big"), payload
        except zmq.Again:
            return
        finally:
            socket.close(0)
