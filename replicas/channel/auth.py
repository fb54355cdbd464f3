"""Both sides prove that they know the cluster secret, without showing it.

Each side sends a fresh nonce; a proof is HMAC-SHA256 over the role, the version, both nonces and the name of the side
that proves. The role keeps one side's proof from being sent back as the other's (reflection), the nonces keep an old
proof from being used again (replay). The frames after the handshake are not signed: on an untrusted network the
channel belongs inside TLS or a private link.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Literal

import msgspec

from replicas.channel.frames import MAGIC, VERSION

NONCE_BYTES = 32


def fresh_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


@dataclass(frozen=True, slots=True)
class Transcript:
    """What a proof is about. `peer_id` is the name of the side that proves."""

    role: Literal["ingress", "replica"]
    replica_nonce: bytes
    ingress_nonce: bytes
    peer_id: str

    def proof(self, secret: bytes) -> bytes:
        """HMAC-SHA256, 32 bytes. Raises ValueError for an empty secret, which would let anyone in."""
        if not secret:
            raise ValueError("the cluster secret is empty")
        # msgpack delimits the parts, so no two transcripts encode to the same bytes.
        message = msgspec.msgpack.encode(
            (MAGIC, VERSION, self.role, self.replica_nonce, self.ingress_nonce, self.peer_id)
        )
        return hmac.new(secret, message, hashlib.sha256).digest()

    def is_proved_by(self, proof: bytes, secret: bytes) -> bool:
        """Whether the other side knew the secret; takes the same time whatever the answer."""
        return hmac.compare_digest(self.proof(secret), proof)
