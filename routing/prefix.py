"""Chained hashes of prompt blocks: how routing recognises a prefix without looking at tokens twice.

    h0 = xxh3_64(model | adapter@version | salt)        h_i = xxh3_64(token bytes of block i, seed = h_(i-1))

So equal hashes mean equal prompts up to there, in the same model, adapter and tenant; to the router that is a hint,
never a proof. Tokens stay packed (uint32, little endian): a block is a slice of bytes, never a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import iter_unpack

from xxhash import xxh3_64_intdigest

TOKEN_BYTES = 4


@dataclass(frozen=True, slots=True)
class Namespace:
    """What separates prefix caches: equal tokens in two namespaces share nothing. `adapter` is `name@version`."""

    model: str
    adapter: str | None = None
    salt: bytes = b""

    def root(self) -> int:
        """h0. The parts are length-prefixed, so that no two namespaces run together."""
        parts = (self.model.encode(), (self.adapter or "").encode(), self.salt)
        return xxh3_64_intdigest(b"".join(len(part).to_bytes(4, "little") + part for part in parts))


def block_hashes(prompt: bytes, block_tokens: int, namespace: Namespace) -> tuple[int, ...]:
    """One hash per full block of `block_tokens` packed ids, in prompt order; a partial last block has none."""
    return block_hashes_after(namespace.root(), prompt, block_tokens)


def block_hashes_after(previous: int, tokens: bytes, block_tokens: int) -> tuple[int, ...]:
    """The hashes of the full blocks of packed `tokens` that follow the block, or the root, hashed `previous`."""
    num_bytes = block_tokens * TOKEN_BYTES
    whole = memoryview(tokens)[: len(tokens) // num_bytes * num_bytes]
    blocks = iter_unpack(f"{num_bytes}s", whole)  # a quarter faster than slicing
    return tuple([previous := xxh3_64_intdigest(block, previous) for (block,) in blocks])
