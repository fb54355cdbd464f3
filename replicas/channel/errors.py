"""What can go wrong with a channel, on either side."""

from __future__ import annotations


class ChannelError(Exception):
    """Root of what the channel raises."""


class EndpointError(ChannelError):
    """An endpoint that cannot be used: malformed, too long a path, in use, or nobody listening."""


class ProtocolError(ChannelError):
    """The peer sent something that is not this protocol, or a frame beyond the bound."""


class FrameTooLargeError(ChannelError):
    """A frame of ours would exceed the peer's bound; nothing was sent."""


class HandshakeError(ChannelError):
    """The link was never established."""


class HandshakeTimeoutError(HandshakeError):
    """The peer did not finish the handshake in time."""


class AuthenticationFailedError(HandshakeError):
    """One side does not know the cluster secret."""


class VersionMismatchError(HandshakeError):
    """The two sides speak different versions of the protocol."""


class LinkLostError(ChannelError):
    """The link to a replica died; what its open requests still produce will never arrive."""

    def __init__(self, replica_id: str, reason: str) -> None:
        super().__init__(f"link to replica {replica_id} lost: {reason}")
        self.replica_id = replica_id
        self.reason = reason
