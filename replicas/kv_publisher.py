"""Tells every ingress what this replica's prefix cache holds: KV events, in the router's blocks, into Redis.

    engine ─► kv_events() ─► RouteBlocks ─► a batch every `publish_s` ─► stream   (what changed)
                                       └──► now and then, on demand ──► snapshot (all there is)

The formats are `routing.kv_events`. One task, off the request path; Redis being down delays it, nothing else. Whatever
goes wrong in Redis (emptied, filled with something else, an entry too many) ends the same way: the stream begins again
with a pointer to a fresh snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from replicas.contract import KvEvent
from replicas.kv_blocks import RouteBlocks
from routing.kv_events import (
    FIELD,
    KvBatch,
    KvKeys,
    KvSnapshot,
    encode_batch,
    encode_snapshot,
    entry_id,
    pack_hashes,
)
from routing.store import Command, Reply, Store, StoreError, StoreReplyError

logger = logging.getLogger(__name__)

EVENTS_AT_ONCE = 64
"""Events translated before the event loop gets its turn: about a millisecond."""

MIN_SNAPSHOT_CHANGES = 1024

SPOILT = ("equal or smaller", "WRONGTYPE")
"""What Redis says of an entry when the stream is not ours any more. Other refusals (no memory left, a replica that
takes no writes) pass by waiting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherOptions:
    """Changes go out every `publish_s`; every `beat_s` and a little Redis is looked at (is all there, does somebody
    want a snapshot?). The keys outlive the last word by `ttl_s`. `max_entries` bounds the stream."""

    publish_s: float = 0.125
    beat_s: float = 0.2
    ttl_s: float = 30.0
    max_entries: int = 1024
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True)
class KvPlace:
    """Whose events these are: `block_tokens` of its model's routing."""

    replica_id: str
    block_tokens: int
    options: PublisherOptions = PublisherOptions()


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry Redis has not confirmed yet."""

    number: int
    raw: bytes
    kv_seq: int
    num_changes: int


_Beat: TypeAlias = tuple[Reply, Reply, Reply, Reply]
"""Replies to: the stream's last entry, renewing the stream, renewing the snapshot, taking a wish for a snapshot."""


class KvPublisher:
    """Publishes for one start of one replica, once `begin` has said which. `source` gives the engine's events since it
    was last called; it is called before that too, so that none pile up there.

    `num_entries`, `num_snapshots` and `num_resets` (times the stream began again) only grow.
    """

    def __init__(self, store: Store, blocks: RouteBlocks, source: Callable[[], list[KvEvent]], place: KvPlace) -> None:
        self.blocks = blocks
        self.num_entries = 0
        self.num_snapshots = 0
        self.num_resets = 0
        self._store = store
        self._source = source
        self._place = place
        self._options = place.options
        self._keys = KvKeys(store.keys, place.replica_id)
        self._epoch: int | None = None
        self._number = 0
        self._kv_seq = 0
        self._unconfirmed: _Entry | None = None
        self._must_reset = True
        self._must_snapshot = False
        self._heard_at: float | None = None
        self._beat_at = float("-inf")
        self._reset_at = float("-inf")
        self._snapshot_number = 0
        self._num_changes = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def epoch(self) -> int:
        assert self._epoch is not None, "nothing is published before `begin`"
        return self._epoch

    @property
    def age_s(self) -> float | None:
        """Seconds since Redis last took a word; None when it never has."""
        return None if self._heard_at is None else self._options.clock() - self._heard_at

    def begin(self, epoch: int) -> None:
        """From now on it is known which start this is: `epoch` as in its `routing.registry.Member`."""
        self._epoch = epoch

    def start(self) -> None:
        """Begins to look after the engine's events; returns at once. Call it once."""
        assert self._task is None, f"{self._place.replica_id} publishes already"
        self._task = asyncio.create_task(self._keep(), name=f"publish the KV events of {self._place.replica_id}")

    async def close(self) -> None:
        """Stops, and takes back what was published; never raises for Redis. Idempotent."""
        if self._task is None:
            return
        task, self._task = self._task, None
        while not task.done():  # a library in between may swallow one cancellation
            task.cancel()
            await asyncio.wait([task], timeout=0.1)
        if self._epoch is None:
            return  # what is there is not ours
        with contextlib.suppress(StoreError):
            await self._store.execute("DEL", self._keys.stream, self._keys.snapshot, self._keys.wanted)

    async def _keep(self) -> None:
        while True:
            try:
                await self.publish()
            except StoreError as error:
                logger.debug("could not publish the KV events of %s: %s", self._place.replica_id, error)
            except Exception:  # our bug: hits are lost, requests are not
                logger.exception("publishing the KV events of %s failed", self._place.replica_id)
                self._must_reset = True
            await self._store.beat(self._options.publish_s)

    async def _collect(self) -> None:
        """Translates what the engine has to tell, a little at a time."""
        events = self._source()
        for start in range(0, len(events), EVENTS_AT_ONCE):
            if start:
                await asyncio.sleep(0)
            self.blocks.apply(events[start : start + EVENTS_AT_ONCE])

    async def publish(self) -> None:
        """One round: whatever the engine has to tell by now. Raises StoreError, then it is told later."""
        await self._collect()
        blocks = self.blocks
        if self._epoch is None:
            blocks.take_changes()  # the first word is a snapshot
            return
        if blocks.cleared or len(blocks.changed) > max(4 * MIN_SNAPSHOT_CHANGES, len(blocks.held)):
            self._must_reset = True  # a snapshot says it shorter
        if self._must_reset:
            if self._options.clock() - self._reset_at >= self._options.beat_s:
                await self._reset()
            return
        entry = self._unconfirmed
        is_beat = self._options.clock() - self._beat_at >= self._options.beat_s
        if entry is not None and not is_beat:
            return  # it was refused, and is tried again with the next beat
        if entry is None:
            entry = self._unconfirmed = self._next_entry(is_beat)
        commands = ([] if entry is None else [self._append(entry)]) + (self._look() if is_beat else [])
        if not commands:
            return
        try:
            replies = await self._store.pipeline(commands)
        except StoreError:
            self._beat_at = float("-inf")  # what became of the entry is to be seen as soon as Redis answers
            raise
        beat: _Beat | None = None
        if is_beat:
            self._beat_at = self._options.clock()
            beat = (replies[-4], replies[-3], replies[-2], replies[-1])
        if entry is not None:
            self._settle(entry, replies[0], beat)
        if beat is not None and not self._must_reset:
            await self._answer(beat)
        if not self._must_reset and self._is_snapshot_due():
            await self._snapshot()

    # Entries.

    def _next_entry(self, is_beat: bool) -> _Entry | None:
        """What has changed; when that is nothing, at a beat, how far the engine's events have come."""
        blocks = self.blocks
        if not blocks.changed and (not is_beat or blocks.kv_seq == self._kv_seq):
            return None
        changed = blocks.take_changes()
        stored = pack_hashes(block for block, is_held in changed.items() if is_held)
        evicted = pack_hashes(block for block, is_held in changed.items() if not is_held)
        number = self._number + 1
        raw = encode_batch(KvBatch(stored, evicted, blocks.kv_seq, False, 0, blocks.gaps), self.epoch, number)
        return _Entry(number, raw, blocks.kv_seq, len(changed))

    def _append(self, entry: _Entry) -> Command:
        where = entry_id(self.epoch, entry.number)
        return ("XADD", self._keys.stream, "MAXLEN", self._options.max_entries, where, FIELD, entry.raw)

    def _settle(self, entry: _Entry, reply: Reply, beat: _Beat | None) -> None:
        """The entry is in the stream, or the stream is not what it should be, or we do not know and ask again."""
        if isinstance(reply, StoreReplyError):
            if beat is None or not any(words in str(reply) for words in SPOILT):
                return  # asked again, and then with a beat
            ours = (entry_id(self.epoch, entry.number).encode(), {FIELD: entry.raw})
            if isinstance(beat[0], StoreReplyError) or beat[0] != [ours]:  # else it had arrived the first time
                logger.warning("the stream %s does not take entries: %s", self._keys.stream, reply)
                self._must_reset = True
                return
        self._confirmed(entry)

    def _confirmed(self, entry: _Entry) -> None:
        self._unconfirmed = None
        self._number = entry.number
        self._kv_seq = entry.kv_seq
        self._num_changes += entry.num_changes
        self.num_entries += 1
        self._heard_at = self._options.clock()

    # Looking after what is in Redis.

    def _look(self) -> list[Command]:
        ttl_ms = round(self._options.ttl_s * 1000)
        return [
            ("XREVRANGE", self._keys.stream, "+", "-", "COUNT", 1),
            ("PEXPIRE", self._keys.stream, ttl_ms),
            ("PEXPIRE", self._keys.snapshot, ttl_ms),
            ("GETDEL", self._keys.wanted),
        ]

    async def _answer(self, beat: _Beat) -> None:
        """Begins the stream again when it does not end as it should; looks whether a snapshot is called for."""
        last, _, has_snapshot, wanted = beat
        here = entry_id(self.epoch, self._number).encode()
        if isinstance(last, StoreReplyError) or [place for place, _ in last] != [here]:
            if self._unconfirmed is None:
                logger.warning("the stream %s is not as it was left: beginning again", self._keys.stream)
                self._must_reset = True
            return
        self._heard_at = self._options.clock()
        if isinstance(wanted, StoreReplyError):
            await self._store.execute("DEL", self._keys.wanted)
        if has_snapshot != 1 or wanted is not None:
            self._must_snapshot = True

    def _is_snapshot_due(self) -> bool:
        """When somebody wants one; and a snapshot with the entries since must stay shorter than two, and complete."""
        num_entries = self._number - self._snapshot_number
        num_changes = max(MIN_SNAPSHOT_CHANGES, len(self.blocks.held) // 2)
        return self._must_snapshot or self._num_changes >= num_changes or num_entries >= self._options.max_entries // 2

    async def _snapshot(self) -> None:
        """Writes what is held after the last entry, and takes the entries before the last snapshot out."""
        if self._unconfirmed is not None or self.blocks.changed:
            return  # it would say more than its number; the next round will do
        before = entry_id(self.epoch, self._snapshot_number)
        replies = await self._store.pipeline(
            [self._set_snapshot(self._number), ("XTRIM", self._keys.stream, "MINID", before)]
        )
        if not isinstance(replies[0], StoreReplyError):
            self._snapshot_number, self._num_changes, self._must_snapshot = self._number, 0, False
            self.num_snapshots += 1

    def _set_snapshot(self, number: int) -> Command:
        blocks, place = self.blocks, self._place
        hashes = pack_hashes(blocks.held)
        snapshot = KvSnapshot(self.epoch, number, blocks.kv_seq, place.block_tokens, hashes, 0, blocks.gaps)
        raw = encode_snapshot(snapshot)
        return ("SET", self._keys.snapshot, raw, "PX", round(self._options.ttl_s * 1000))

    async def _reset(self) -> None:
        """A stream of one entry, that points to a snapshot of now."""
        self._reset_at = self._options.clock()
        number = self._number = self._number + 1  # never again the same, whatever comes of this
        self.blocks.take_changes()
        self._unconfirmed = None
        kv_seq = self.blocks.kv_seq
        raw = encode_batch(KvBatch(b"", b"", kv_seq, True, 0), self.epoch, number)
        replies = await self._store.pipeline(
            [
                ("DEL", self._keys.stream),
                self._set_snapshot(number),
                self._append(_Entry(number, raw, kv_seq, 0)),
                ("PEXPIRE", self._keys.stream, round(self._options.ttl_s * 1000)),
            ]
        )
        for reply in replies:
            if isinstance(reply, StoreReplyError):
                raise reply
        self._must_reset = self._must_snapshot = False
        self._snapshot_number, self._kv_seq, self._num_changes = number, kv_seq, 0
        self._heard_at = self._beat_at = self._options.clock()
        self.num_resets += 1
