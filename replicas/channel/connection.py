"""The ingress's side of a connection: the handshake, then frames to the link."""

from __future__ import annotations

import asyncio
from typing import Protocol

from replicas.channel.auth import Transcript, fresh_nonce
from replicas.channel.errors import (
    AuthenticationFailedError,
    HandshakeError,
    ProtocolError,
    VersionMismatchError,
)
from replicas.channel.frames import (
    MAGIC,
    MAX_WELCOME_BYTES,
    VERSION,
    Challenge,
    Frame,
    Hello,
    Ping,
    Refusal,
    ReplicaFrame,
    Welcome,
    decode_greeting,
    decode_replica,
)
from replicas.channel.transport import ChannelOptions, FrameProtocol

_REFUSALS: dict[str, type[HandshakeError]] = {
    "authentication_failed": AuthenticationFailedError,
    "version_mismatch": VersionMismatchError,
}


class LinkEvents(Protocol):
    """Who hears what an established connection says."""

    def received(self, frame: ReplicaFrame) -> None: ...

    def read_done(self) -> None:
        """All frames of one read from the socket were received."""
        ...

    def lost(self, reason: str) -> None: ...


class LinkConnection(FrameProtocol):
    """The ingress's side of the handshake, then frames to the link."""

    def __init__(self, secret: bytes, ingress_id: str, options: ChannelOptions) -> None:
        super().__init__(options)
        self.max_frame_bytes = MAX_WELCOME_BYTES
        self.welcome: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self._secret = secret
        self._ingress_id = ingress_id
        self._nonce = fresh_nonce()
        self._challenge: Challenge | None = None
        self._link: LinkEvents | None = None

    def attach(self, link: LinkEvents) -> None:
        """Frames go to `link` from now on (the replica may have sent heartbeats before: they are skipped)."""
        self._link = link

    def give_up(self) -> None:
        """Leaves no connection behind a failed or cancelled handshake."""
        if self.welcome.done() and not self.welcome.cancelled():
            self.welcome.exception()  # it was raised, or nobody is left to hear it
        self.welcome.cancel()
        if hasattr(self, "transport"):
            self.fail("no handshake")

    def on_connected(self) -> None:
        """The replica speaks first."""

    def on_frame(self, payload: memoryview) -> None:
        if self._link is not None:
            self._link.received(decode_replica(payload))
        elif not self.welcome.done():
            self._greet(payload)

    def on_read(self) -> None:
        if self._link is not None and self.lost_reason is None:
            self._link.read_done()

    def _greet(self, payload: memoryview) -> None:
        greeting = decode_greeting(payload)
        if isinstance(greeting, Refusal):
            error = _REFUSALS.get(greeting.code, HandshakeError)(greeting.message)
            self._reject(error)
        elif isinstance(greeting, Challenge) and self._challenge is None:
            self._on_challenge(greeting)
        elif isinstance(greeting, Welcome) and self._challenge is not None:
            self._on_welcome(greeting, self._challenge)
        else:
            self._reject(ProtocolError(f"unexpected {type(greeting).__name__} in the handshake"))

    def _on_challenge(self, challenge: Challenge) -> None:
        if challenge.magic != MAGIC:
            self._reject(ProtocolError(f"the peer is no replica: it calls its protocol {challenge.magic[:40]!r}"))
        elif challenge.version != VERSION:
            message = f"the replica speaks channel version {challenge.version}, this ingress {VERSION}"
            self._reject(VersionMismatchError(message))
        else:
            self._challenge = challenge
            ours = Transcript("ingress", challenge.nonce, self._nonce, self._ingress_id)
            self.send(Hello(VERSION, self._ingress_id, self._nonce, ours.proof(self._secret)))

    def _on_welcome(self, welcome: Welcome, challenge: Challenge) -> None:
        theirs = Transcript("replica", challenge.nonce, self._nonce, welcome.replica_id)
        if not theirs.is_proved_by(welcome.proof, self._secret):
            self._reject(AuthenticationFailedError("the replica does not know this ingress's cluster secret"))
            return
        self.max_frame_bytes = self.options.max_frame_bytes
        self.start_heartbeats()
        self.welcome.set_result(welcome)

    def _reject(self, error: Exception) -> None:
        self.welcome.set_exception(error)
        self.fail(str(error))

    def heartbeat(self) -> Frame:
        return Ping()

    def on_lost(self, reason: str) -> None:
        if not self.welcome.done():
            is_protocol = reason.startswith("protocol error")
            self.welcome.set_exception((ProtocolError if is_protocol else HandshakeError)(reason))
        if self._link is not None:
            self._link.lost(reason)
