"""The token channel between an ingress and a replica: one authenticated, multiplexed connection.

The replica runs `ChannelServer(engine, replica_id, secret, ServerOptions(journal=…))` and `start([endpoint])`. The
ingress holds `link = await ReplicaLink.connect(endpoint, secret, ingress_id, LinkOptions(on_lost=…))` and reads
`async for delta in link.open(request)`.
"""

from replicas.channel.client import DeltaStream, LinkOptions, ReplicaLink
from replicas.channel.errors import (
    AuthenticationFailedError,
    ChannelError,
    EndpointError,
    FrameTooLargeError,
    HandshakeError,
    HandshakeTimeoutError,
    LinkLostError,
    ProtocolError,
    VersionMismatchError,
)
from replicas.channel.journal import Journal, JsonLinesJournal, UsageRecord
from replicas.channel.server import ChannelServer, ServerOptions
from replicas.channel.transport import ChannelOptions

__all__ = [
    "AuthenticationFailedError",
    "ChannelError",
    "ChannelOptions",
    "ChannelServer",
    "DeltaStream",
    "EndpointError",
    "FrameTooLargeError",
    "HandshakeError",
    "HandshakeTimeoutError",
    "Journal",
    "JsonLinesJournal",
    "LinkLostError",
    "LinkOptions",
    "ProtocolError",
    "ReplicaLink",
    "ServerOptions",
    "UsageRecord",
    "VersionMismatchError",
]
