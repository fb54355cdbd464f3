"""What replicas write into Redis about their prefix caches, and ingresses read: the keys, the formats, the checks.

    wg:{cluster}:kv:<replica_id>        stream; the entry `<epoch>-<number>` holds a KvBatch in its field `b`
    wg:{cluster}:kvsnap:<replica_id>    KvSnapshot: everything held after the entry of its number
    wg:{cluster}:kvwant:<replica_id>    set by an ingress that cannot use the snapshot there is

`epoch` grows with each start of a replica, `number` by one with each entry: Redis itself refuses an entry that comes
late or twice, and whoever reads sees at once when one is missing. All integers are little endian; block hashes are
packed 8 bytes each, least recently used first where that is known.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import msgspec
from xxhash import xxh3_64_intdigest

from routing.store import Keys

FIELD = b"b"


class KvBatch(msgspec.Struct, frozen=True, array_like=True):
    """Changes since the entry before: first `evicted` goes, then `stored` comes. Both are packed block hashes.

    `kv_seq`: the engine's events before this number are contained. `resync`: this entry says nothing, the snapshot of
    the same number says it all. `check` is a digest of the content, seeded with its place in the stream. `gaps`: some
    block may be held without one that comes before it.
    """

    stored: bytes
    evicted: bytes
    kv_seq: int
    resync: bool
    check: int
    gaps: bool = False


class KvSnapshot(msgspec.Struct, frozen=True, array_like=True):
    """All a replica holds after entry `number`; the rest as in KvBatch."""

    epoch: int
    number: int
    kv_seq: int
    block_tokens: int
    hashes: bytes
    check: int
    gaps: bool = False


class KvKeys:
    """The keys of one replica."""

    __slots__ = ("snapshot", "stream", "wanted")

    def __init__(self, keys: Keys, replica_id: str) -> None:
        self.stream = keys("kv", replica_id)
        self.snapshot = keys("kvsnap", replica_id)
        self.wanted = keys("kvwant", replica_id)


def pack_hashes(hashes: Iterable[int]) -> bytes:
    return array("Q", hashes).tobytes()


def unpack_hashes(packed: bytes) -> list[int]:
    """The inverse of `pack_hashes`; raises ValueError for half a hash."""
    hashes = array("Q")
    hashes.frombytes(packed)
    return hashes.tolist()


def entry_id(epoch: int, number: int) -> str:
    return f"{epoch}-{number}"


def parse_entry_id(raw: bytes) -> tuple[int, int]:
    """(epoch, number); raises ValueError."""
    epoch, _, number = raw.partition(b"-")
    return int(epoch), int(number)


def encode_batch(batch: KvBatch, epoch: int, number: int) -> bytes:
    """The field's value; `check` is filled in."""
    return _encode(msgspec.structs.replace(batch, check=_batch_check(batch, epoch, number)))


def decode_batch(raw: bytes, epoch: int, number: int) -> KvBatch:
    """Raises ValueError for anything that `encode_batch` did not make for this place in this stream."""
    batch = _batches.decode(raw)
    if batch.check != _batch_check(batch, epoch, number) or len(batch.stored) % 8 or len(batch.evicted) % 8:
        raise ValueError(f"the batch at {epoch}-{number} is not what was written")
    return batch


def encode_snapshot(snapshot: KvSnapshot) -> bytes:
    """`check` is filled in."""
    return _encode(msgspec.structs.replace(snapshot, check=_snapshot_check(snapshot)))


def decode_snapshot(raw: bytes) -> KvSnapshot:
    """Raises ValueError for anything that `encode_snapshot` did not make."""
    snapshot = _snapshots.decode(raw)
    if snapshot.check != _snapshot_check(snapshot) or len(snapshot.hashes) % 8:
        raise ValueError(f"the snapshot at {snapshot.epoch}-{snapshot.number} is not what was written")
    return snapshot


_encode = msgspec.msgpack.Encoder().encode
_batches = msgspec.msgpack.Decoder(KvBatch)
_snapshots = msgspec.msgpack.Decoder(KvSnapshot)


def _batch_check(batch: KvBatch, epoch: int, number: int) -> int:
    place = xxh3_64_intdigest(b"%d-%d-%d-%d-%d" % (epoch, number, batch.kv_seq, batch.resync, batch.gaps))
    return xxh3_64_intdigest(batch.evicted, xxh3_64_intdigest(batch.stored, place))


def _snapshot_check(snapshot: KvSnapshot) -> int:
    counts = (snapshot.epoch, snapshot.number, snapshot.kv_seq, snapshot.block_tokens, snapshot.gaps)
    place = b"%d-%d-%d-%d-%d" % counts
    return xxh3_64_intdigest(snapshot.hashes, xxh3_64_intdigest(place))
