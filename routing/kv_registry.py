"""Keeps an ingress's index exact: one task reads the KV streams of all connected replicas, one watches their age.

    sources (connected replicas) ─► followers ─► XREAD of all streams ─► index
                                        └─ lost ─► snapshot + entries since ─► index

What an exact entry says was true no longer than `late_s`, the replicas' heartbeat and the watch's period ago: a replica
counts its events over its own connection, and one whose stream does not keep up, for whatever reason, is mirrored until
it does. So Redis frozen, gone, emptied or filled with lies costs hits, and nothing on the request path waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from routing.index import PrefixIndex
from routing.kv_events import KvKeys, KvSnapshot, decode_snapshot
from routing.kv_follow import Entries, Follower, KvSource, LostError
from routing.store import Command, Reply, Store, StoreError, StoreReplyError

log = logging.getLogger(__name__)

MAX_HEALS = 4
"""Snapshots read in one round trip: half a megabyte each at 4 million KV tokens."""

MAX_ENTRIES = 256
"""Entries of one stream read in one round trip."""

MAX_ENTRIES_SINCE = 1024
"""Entries after a snapshot that are read with it: all that a stream may hold."""

WANTED_MS = 5000

LOAD_STEP = 4096
"""Blocks of a snapshot entered before the event loop gets its turn: one or two milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRegistryOptions:
    """Seconds. Streams are read every `poll_s` while some replica has said of events that were not read, else every
    `idle_s`; ages are looked at every `watch_s`; a replica with events that were not read for `late_s` is doubted."""

    poll_s: float = 0.125
    idle_s: float = 0.2
    watch_s: float = 0.1
    late_s: float = 1.0
    clock: Callable[[], float] = time.monotonic


class KvRegistry:
    """Feeds an index whose replicas somebody else adds and drops. `sources` is asked for those that are connected now.

    `num_entries` and `num_heals` only grow, `num_lost` too, by reason.
    """

    def __init__(
        self,
        store: Store,
        index: PrefixIndex,
        sources: Callable[[], Iterable[KvSource]],
        options: KvRegistryOptions | None = None,
    ) -> None:
        self.num_entries = 0
        self.num_heals = 0
        self.num_lost: Counter[str] = Counter()
        self._store = store
        self._index = index
        self._sources = sources
        self._options = options or KvRegistryOptions()
        self._followers: dict[str, Follower] = {}
        self._read_at = float("-inf")
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to read and watch; returns at once. Call it once."""
        assert not self._tasks, "the registry runs already"
        self._tasks = [
            asyncio.create_task(self._keep_reading(), name="read KV streams"),
            asyncio.create_task(self._keep_watching(), name="watch KV streams"),
        ]

    async def close(self) -> None:
        """Stops; the index stays as it is. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            while not task.done():  # a library in between may swallow one cancellation
                task.cancel()
                await asyncio.wait([task], timeout=0.1)

    async def caught_up(self) -> None:
        """Returns when every replica that publishes is followed."""
        while not all(follower.following for follower in self._followers.values()):  # noqa: ASYNC110 a few polls
            await asyncio.sleep(self._options.poll_s / 4)

    def lags_s(self) -> dict[str, float]:
        """By replica: for how long there have been events that this ingress has not read; 0 when it has read all."""
        now = self._options.clock()
        return {replica_id: follower.lag_s(now) for replica_id, follower in self._followers.items()}

    def num_following(self) -> int:
        return sum(follower.following for follower in self._followers.values())

    # Watching.

    def look(self) -> None:
        """Follows who is connected, doubts who is late, forgets expectations that have expired."""
        now = self._options.clock()
        sources = {source.replica_id: source for source in self._sources()}
        for replica_id in self._followers.keys() - sources.keys():
            del self._followers[replica_id]
            self._index.doubt(replica_id)  # whoever is connected now is not known to be who published
        for replica_id, source in sources.items():
            follower = self._followers.get(replica_id)
            if follower is None or not follower.is_of(source):
                follower = self._followers[replica_id] = Follower(source, KvKeys(self._store.keys, replica_id))
                self._index.doubt(replica_id)
            follower.announced(source.kv_seq, now)
            if follower.following and not self._index.is_exact(replica_id):
                self._lose(follower, LostError("reconnected"))
            elif follower.following and follower.lag_s(now) > self._options.late_s:
                self._lose(follower, LostError("late", f"{follower.lag_s(now):.2f} s behind"))
        self._index.expire(now)

    def _lose(self, follower: Follower, error: LostError) -> None:
        """Believes a replica's stream no longer."""
        log.info("lost the KV stream of %s: %s", follower.replica_id, error)
        self.num_lost[error.reason] += 1
        self._index.doubt(follower.replica_id)
        follower.lost(self._options.clock())

    async def _keep_watching(self) -> None:
        while True:
            try:
                self.look()
            except Exception:  # our bug, but the watch must outlive it
                log.exception("watching the KV streams failed")
            await asyncio.sleep(self._options.watch_s)

    # Reading.

    async def _keep_reading(self) -> None:
        while True:
            has_more = False
            try:
                has_more = self._is_due() and await self.read()
            except StoreError as error:
                log.debug("could not read KV streams: %s", error)
            except Exception:  # our bug: hits are lost, requests are not
                log.exception("reading KV streams failed")
            if has_more:
                await asyncio.sleep(0)
            else:
                await self._store.beat(self._options.poll_s)

    def _is_due(self) -> bool:
        """Whether there is something to read, as far as is known here: to ask Redis costs as much as a request."""
        now = self._options.clock()
        if now - self._read_at >= self._options.idle_s:
            return True
        return any(not follower.following or follower.lag_s(now) > 0 for follower in self._followers.values())

    async def read(self) -> bool:
        """One round: new entries of those that are followed, snapshots of some that are lost; whether there is more.

        Raises StoreError.
        """
        self._read_at = self._options.clock()
        following = [follower for follower in self._followers.values() if follower.following]
        has_more = await self._read_entries(following)
        return await self._heal() or has_more

    async def _read_entries(self, followers: Sequence[Follower]) -> bool:
        if not followers:
            return False
        try:
            replies = [await self._store.execute(*_xread(followers, MAX_ENTRIES))]
        except StoreReplyError:  # one key of another type fails the command for all
            replies = await self._store.pipeline([_xread([follower], MAX_ENTRIES) for follower in followers])
            for follower, reply in zip(followers, replies, strict=True):
                if isinstance(reply, StoreReplyError):
                    self._lose(follower, LostError("garbage", str(reply)))
        by_key = {follower.keys.stream.encode(): follower for follower in followers}
        has_more = False
        for reply in replies:
            for key, entries in _streams(reply):
                has_more |= self._take(by_key[key], entries)
        return has_more

    def _take(self, follower: Follower, entries: Entries) -> bool:
        """Whether there may be more."""
        if self._followers.get(follower.replica_id) is not follower or not follower.following:
            return False  # it has left, or was doubted, while Redis was asked
        if not self._index.is_exact(follower.replica_id):
            return False  # connected anew
        try:
            self.num_entries += follower.take(entries, self._index)
        except LostError as error:
            self._lose(follower, error)
            return True
        return len(entries) == MAX_ENTRIES

    # Healing.

    async def _heal(self) -> bool:
        """Tries to find some of the lost again; whether others wait for it."""
        now = self._options.clock()
        due = [f for f in self._followers.values() if not f.following and f.retry_at <= now]
        chosen = due[:MAX_HEALS]
        if not chosen:
            return False
        raws = await self._store.pipeline([("GET", follower.keys.snapshot) for follower in chosen], alone=True)
        found = [(follower, _snapshot(raw)) for follower, raw in zip(chosen, raws, strict=True)]
        usable = [(follower, snapshot) for follower, snapshot in found if snapshot is not None]
        tails = await self._store.pipeline(
            [
                _xread([follower], MAX_ENTRIES_SINCE, f"{snapshot.epoch}-{snapshot.number}")
                for follower, snapshot in usable
            ],
            alone=True,
        )
        for follower, _ in [pair for pair in found if pair[1] is None]:
            await self._fail(follower, LostError("new", "no snapshot"))
        for (follower, snapshot), tail in zip(usable, tails, strict=True):
            try:
                await self._restore(follower, snapshot, tail)
            except LostError as error:
                await self._fail(follower, error)
        return len(due) > len(chosen)

    async def _restore(self, follower: Follower, snapshot: KvSnapshot, tail: Reply) -> None:
        """Makes the index exact again. Raises LostError when what was read is damaged, or too old."""
        if isinstance(tail, StoreReplyError):
            raise LostError("garbage", str(tail))
        entries = [entry for _, found in _streams(tail) for entry in found]
        blocks = follower.restore(snapshot, entries)
        lag_s = follower.lag_s(self._options.clock())
        if lag_s > self._options.late_s:
            raise LostError("late", f"{lag_s:.2f} s behind")
        for start in range(0, len(blocks) - LOAD_STEP, LOAD_STEP):  # as guesses: what is there already loads fast
            self._index.insert(follower.replica_id, blocks[start : start + LOAD_STEP])
            await asyncio.sleep(0)
        if self._followers.get(follower.replica_id) is not follower or follower.replica_id not in self._index:
            return  # it has left
        self._index.load(follower.replica_id, blocks)
        if not follower.gaps:
            self._index.vouch(follower.replica_id)
        follower.found()
        self.num_heals += 1

    async def _fail(self, follower: Follower, error: LostError) -> None:
        """Asks the replica for a better snapshot, and tries again later."""
        log.debug("cannot follow the KV stream of %s yet: %s", follower.replica_id, error)
        follower.failed(self._options.clock())
        with contextlib.suppress(StoreReplyError):
            await self._store.execute("SET", follower.keys.wanted, "1", "PX", WANTED_MS)


def _xread(followers: Sequence[Follower], max_entries: int, after: str | None = None) -> Command:
    keys = [follower.keys.stream for follower in followers]
    ids = [follower.position if after is None else after for follower in followers]
    return ("XREAD", "COUNT", max_entries, "STREAMS", *keys, *ids)


def _streams(reply: Reply) -> list[tuple[bytes, Entries]]:
    """(key, entries) of each stream that had some."""
    if isinstance(reply, StoreReplyError) or not reply:
        return []
    pairs = reply.items() if isinstance(reply, dict) else reply
    return [(key, entries) for key, entries in pairs]


def _snapshot(raw: Reply) -> KvSnapshot | None:
    """The snapshot, if there is one and it makes sense."""
    if isinstance(raw, bytes):
        with contextlib.suppress(ValueError):
            return decode_snapshot(raw)
    return None
