"""One replica's prefix cache as an ingress has read it: what to do with an entry, a gap, a snapshot. No I/O.

    lost ── snapshot and the entries since, up to date ──► following ── next entry ──► following
     ▲                                                         │
     └── a number missing, another epoch, garbage, a resync, too late, connected anew

While lost, the index mirrors what this ingress sends (`PrefixIndex.doubt`); while following, it is exact.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

from routing.index import PrefixIndex
from routing.kv_events import FIELD, KvBatch, KvKeys, KvSnapshot, decode_batch, entry_id, parse_entry_id, unpack_hashes
from routing.store import Reply

Reason: TypeAlias = Literal["new", "gap", "epoch", "garbage", "resync", "late", "reconnected"]
"""Why a replica's stream cannot be followed."""

Entries: TypeAlias = Sequence[tuple[bytes, dict[bytes, bytes]]]
"""As XREAD gives them: id, fields."""

MARK_S = 0.1
"""Announcements closer together than this count as one, of the earlier time."""

MAX_MARKS = 64

FIRST_RETRY_S = 0.1
MAX_RETRY_S = 3.2


class KvSource(msgspec.Struct, frozen=True):
    """A connected replica that publishes events. `kv_seq`: the number its next event will have, as it last said over
    its own connection: the measure of how far behind the stream is, whatever clocks and Redis do."""

    replica_id: str
    epoch: int
    block_tokens: int
    kv_seq: int
    start_id: str = ""


class LostError(Exception):
    """The stream cannot be followed any further."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason: Reason = reason


class Follower:
    """Where one replica's stream stands. Times are seconds on one monotonic clock."""

    def __init__(self, source: KvSource, keys: KvKeys) -> None:
        self.replica_id = source.replica_id
        self.epoch = source.epoch
        self.start_id = source.start_id
        self.block_tokens = source.block_tokens
        self.keys = keys
        self.following = False
        self.number = 0
        self.kv_seq = 0
        self.gaps = False  # what was read may have some
        self.retry_at = float("-inf")
        self._retry_s = FIRST_RETRY_S
        self._last = 0
        self._marks: deque[tuple[float, int]] = deque()  # (when, kv_seq announced), oldest first, not yet read

    def is_of(self, source: KvSource) -> bool:
        """Whether it follows this start of the replica."""
        return (self.epoch, self.start_id, self.block_tokens) == (source.epoch, source.start_id, source.block_tokens)

    @property
    def position(self) -> str:
        """The id of the last entry read."""
        return entry_id(self.epoch, self.number)

    def announced(self, kv_seq: int, now: float) -> None:
        """The replica said over its connection how many events there are."""
        marks = self._marks
        if kv_seq < self._last:  # it started anew, under an epoch that a clock gave it twice: all is to be read again
            marks.clear()
            self.kv_seq = 0
        self._last = kv_seq
        if kv_seq <= self.kv_seq or (marks and kv_seq <= marks[-1][1]):
            return
        if marks and (now - marks[-1][0] < MARK_S or len(marks) >= MAX_MARKS):
            marks[-1] = (marks[-1][0], kv_seq)
        else:
            marks.append((now, kv_seq))

    def lag_s(self, now: float) -> float:
        """For how long there have been events that were not read; 0 when all are."""
        marks = self._marks
        while marks and marks[0][1] <= self.kv_seq:
            marks.popleft()
        return now - marks[0][0] if marks else 0.0

    def take(self, entries: Entries, index: PrefixIndex) -> int:
        """Applies entries that follow the last one; returns how many. Raises LostError: the index then still says what
        was true before the entry that is wrong."""
        for where, fields in entries:
            batch = self._next(where, fields)
            if batch.evicted:
                index.evict(self.replica_id, unpack_hashes(batch.evicted))
            if batch.stored:
                index.insert(self.replica_id, unpack_hashes(batch.stored))
            if batch.gaps:
                index.allow_gaps(self.replica_id)
        return len(entries)

    def restore(self, snapshot: KvSnapshot, entries: Entries) -> list[int]:
        """What the replica holds after a snapshot and the entries since; least recently used first.

        The follower stands behind them then. Raises LostError when they do not fit together.
        """
        if snapshot.epoch != self.epoch:
            raise LostError("epoch", f"the snapshot is of {snapshot.epoch}, the replica of {self.epoch}")
        if snapshot.block_tokens != self.block_tokens:
            raise LostError("garbage", f"routing blocks of {snapshot.block_tokens} tokens, here {self.block_tokens}")
        self.number, self.kv_seq, self.gaps = snapshot.number, snapshot.kv_seq, snapshot.gaps
        held = dict.fromkeys(unpack_hashes(snapshot.hashes))
        for where, fields in entries:
            batch = self._next(where, fields)
            for block in unpack_hashes(batch.evicted):
                held.pop(block, None)
            held.update(dict.fromkeys(unpack_hashes(batch.stored)))
        return list(held)

    def found(self) -> None:
        """It is followed from here on."""
        self.following = True
        self._retry_s = FIRST_RETRY_S

    def lost(self, now: float) -> None:
        """It is not followed any more; the first attempt to find it again is due at once."""
        self.following = False
        self.retry_at = now

    def failed(self, now: float) -> None:
        """An attempt to find it came to nothing: the next one is due later."""
        self.retry_at = now + self._retry_s
        self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)

    def _next(self, where: Reply, fields: Reply) -> KvBatch:
        """The batch of the entry that must be next. Raises LostError."""
        try:
            epoch, number = parse_entry_id(where)
            if epoch != self.epoch:
                raise LostError("epoch", f"an entry of {epoch}, the replica is of {self.epoch}")
            if number != self.number + 1:
                raise LostError("gap", f"entry {number} after {self.number}")
            batch = decode_batch(fields[FIELD], epoch, number)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # whatever else may stand in a stream
            raise LostError("garbage", f"{type(error).__name__}: {error}") from error
        if batch.resync:
            raise LostError("resync")
        self.number = number
        self.kv_seq = max(self.kv_seq, batch.kv_seq)
        self.gaps = self.gaps or batch.gaps
        return batch
