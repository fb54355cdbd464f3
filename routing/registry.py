"""Who is there: replicas announce themselves with an expiry, ingresses watch.

    wg:{cluster}:members              set of replica ids
    wg:{cluster}:member:<replica_id>  JSON of a Member or a Withdrawn, expires after `ttl_s`
    wg:{cluster}:load:<replica_id>    JSON of its Load as of its last word, expires likewise

Absence proves nothing: Redis may have been emptied or restarted. So a member that is missing stays known for `ttl_s`
more, in which a live one has announced itself again; one that withdraws leaves a Withdrawn and is dropped at once.
Whether a member can be reached is for the channel to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import msgspec

from routing.store import BadValueError, Command, Reply, Store, StoreError, StoreReplyError

log = logging.getLogger(__name__)

MAX_MEMBERS = 10_000


class Member(msgspec.Struct, frozen=True, kw_only=True, tag="member", tag_field="kind"):
    """A replica that can take requests.

    `epoch` grows with each start of the same `replica_id`, so that a late word of the one before counts for nothing.
    `start_id` is random, and told over the replica's own connections too: who is connected knows whose word this is.
    `endpoint`: unix:///path, usable on `host_id` alone, or tcp://host:port. `started_at`: Unix seconds.
    """

    replica_id: str
    group: str
    model: str
    endpoint: str
    epoch: int
    host_id: str
    pid: int
    started_at: float
    engine: str = ""
    start_id: str = ""


class Withdrawn(msgspec.Struct, frozen=True, kw_only=True, tag="withdrawn", tag_field="kind"):
    """The replica takes no more requests."""

    replica_id: str
    epoch: int
    start_id: str = ""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica is doing, for who is not connected to it (`warmgate status`). Ingresses hear it over the channel,
    with every step: this copy is up to `announce_s` old. `num_prefix_blocks`: routing blocks in its prefix cache;
    `kv_age_s`: seconds since Redis last took its word about that, None for one that has none to give."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_output_tokens: int = 0
    draining: bool = False
    num_prefix_blocks: int = 0
    kv_age_s: float | None = None


_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Member | Withdrawn)
_load_decoder = msgspec.json.Decoder(Load)

Members: TypeAlias = Mapping[str, Member]
"""By replica id; a snapshot that never changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryOptions:
    """Seconds. A member lives `ttl_s` beyond its last word and renews it every `announce_s`."""

    ttl_s: float = 5.0
    announce_s: float = 1.0
    poll_s: float = 0.25
    clock: Callable[[], float] = time.monotonic


class Announcement:
    """Keeps one member announced until `withdraw`. Redis being down delays it, nothing else.

    `load` is asked for each word; it may raise, then that word has no load.
    """

    def __init__(
        self, store: Store, member: Member, load: Callable[[], Load], options: RegistryOptions | None = None
    ) -> None:
        self.member = member
        self._load = load
        self._store = store
        self._options = options or RegistryOptions()
        self._index = store.keys("members")
        self._key = store.keys("member", member.replica_id)
        self._load_key = store.keys("load", member.replica_id)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Announces now and again every `announce_s`; returns at once. Call it once."""
        assert self._task is None, f"{self.member.replica_id} is announced already"
        self._task = asyncio.create_task(self._keep(), name=f"announce {self.member.replica_id}")

    async def withdraw(self) -> None:
        """Stops announcing and tells the watchers; never raises for Redis. Idempotent."""
        if self._task is None:
            return
        task, self._task = self._task, None
        await _stop(task)
        try:
            gone = self.member
            await self._say(Withdrawn(replica_id=gone.replica_id, epoch=gone.epoch, start_id=gone.start_id))
        except StoreError as error:
            log.warning("could not withdraw %s (it expires by itself): %s", self.member.replica_id, error)

    async def _keep(self) -> None:
        while True:
            later = False
            try:
                later = await self._say(self.member)
            except StoreError as error:
                log.debug("could not announce %s: %s", self.member.replica_id, error)
            # A later start of the same replica speaks more often than this one does beside it, so it is heard.
            often = self._options.announce_s
            await self._store.beat(max(self._options.ttl_s / 2, 2 * often) if later else often)

    async def _say(self, word: Member | Withdrawn) -> bool:
        """Returns whether a word of a later epoch stood there."""
        ttl_ms = round(self._options.ttl_s * 1000)
        add: Command = ("SADD", self._index, self.member.replica_id)
        load: Command = ("DEL", self._load_key)
        if isinstance(word, Member):
            with contextlib.suppress(Exception):  # an engine that died since: its channel says so
                load = ("SET", self._load_key, _encode(self._load()), "PX", ttl_ms)
        before, *replies = await self._store.pipeline(
            [
                ("GET", self._key),
                ("SET", self._key, _encode(word), "PX", ttl_ms),
                add,
                ("PEXPIRE", self._index, 10 * ttl_ms),  # nobody announces any more: leave nothing behind
                load,
            ]
        )
        if isinstance(replies[0], StoreReplyError):
            log.warning("Redis does not take the word of %s: %s", self.member.replica_id, replies[0])
        if isinstance(replies[1], StoreReplyError):  # somebody put a value of another type there
            await self._store.pipeline([("DEL", self._index), add])
        known = read_word(self._store, self._key, before)
        return known is not None and known.epoch > word.epoch


class MemberWatch:
    """An ingress's copy of the member set, kept fresh by a task of its own; reading it never waits.

    While Redis cannot be asked, the last known set stays; so does a member that only Redis has lost (it refuses writes,
    say) while somebody is connected to it: `connected` gives the `start_id` of the process at the other end, None where
    there is no connection. Callbacks run on the event loop, once per change.
    """

    def __init__(
        self,
        store: Store,
        options: RegistryOptions | None = None,
        connected: Callable[[str], str | None] = lambda replica_id: None,
    ) -> None:
        self._store = store
        self._options = options or RegistryOptions()
        self._connected = connected
        self._index = store.keys("members")
        self._members: Members = MappingProxyType({})
        self._missing_since: dict[str, float] = {}
        self._overruled: dict[str, str] = {}
        self._callbacks: list[Callable[[Members], None]] = []
        self._task: asyncio.Task[None] | None = None
        self._synced_at: float | None = None

    @property
    def members(self) -> Members:
        return self._members

    @property
    def age_s(self) -> float | None:
        """Seconds since Redis last confirmed the set; None when it never has."""
        return None if self._synced_at is None else self._options.clock() - self._synced_at

    def subscribe(self, callback: Callable[[Members], None]) -> None:
        """Calls back with the whole new set after each change, and now when it is not empty."""
        self._callbacks.append(callback)
        if self._members:
            callback(self._members)

    def start(self) -> None:
        """Begins to watch; returns at once. Call it once."""
        assert self._task is None, "the watch runs already"
        self._task = asyncio.create_task(self._keep(), name="watch members")

    async def close(self) -> None:
        """Stops watching; the last set stays readable. Idempotent."""
        if self._task is not None:
            task, self._task = self._task, None
            await _stop(task)

    async def refresh(self) -> None:
        """Reads the set once. Raises StoreError, then nothing has changed."""
        known = sorted(self._members)
        listing, *told = await self._store.pipeline([("SMEMBERS", self._index), *self._asking(known)])
        listed = _names(_good(listing))
        new = sorted(listed - self._members.keys())
        told += await self._store.pipeline(self._asking(new)) if new else []
        values = [value for values in told for value in _good(values)]
        words = {i: self._word(i, raw) for i, raw in zip([*known, *new], values, strict=True)}
        if self.age_s is None or self.age_s > self._options.ttl_s / 2:
            self._missing_since.clear()  # nobody could be heard: their silence begins now
        self._synced_at = self._options.clock()
        members = {i: m for i, word in words.items() if (m := self._resolve(i, word)) is not None}
        for replica_id in self._overruled.keys() - members.keys():
            del self._overruled[replica_id]
        await self._prune([i for i in listed if i not in members and words[i] is None])
        self._publish(members)

    async def loads(self) -> dict[str, Load]:
        """The last known load of every member that has told one. Raises StoreError."""
        ids = sorted(self._members)
        keys = [self._store.keys("load", replica_id) for replica_id in ids]
        values = await self._store.execute("MGET", *keys) if keys else []
        found: dict[str, Load] = {}
        for replica_id, key, raw in zip(ids, keys, values, strict=True):
            if raw is not None:
                with contextlib.suppress(BadValueError):
                    found[replica_id] = self._store.decode(key, raw, _load_decoder)
        return found

    async def _keep(self) -> None:
        while True:
            try:
                await self.refresh()
            except StoreError as error:
                log.debug("keeping %d known members: %s", len(self._members), error)
            except Exception:  # our bug, but the watch must outlive it
                log.exception("reading the members failed")
            await self._store.beat(self._options.poll_s)

    def _asking(self, ids: Sequence[str]) -> list[Command]:
        return [("MGET", *(self._store.keys("member", replica_id) for replica_id in ids))] if ids else []

    def _word(self, replica_id: str, raw: Reply) -> Member | Withdrawn | None:
        """What a replica says about itself; None for nothing, or nothing that makes sense."""
        key = self._store.keys("member", replica_id)
        word = read_word(self._store, key, raw)
        if word is None or word.replica_id == replica_id:
            return word
        log.warning("%s speaks of %s", key, word.replica_id)
        return None

    def _resolve(self, replica_id: str, word: Member | Withdrawn | None) -> Member | None:
        """The member to believe in after hearing `word`."""
        known = self._members.get(replica_id)
        linked = self._connected(replica_id)
        if word is None:
            return self._linger(replica_id, known, linked is not None)
        heard = word if isinstance(word, Member) else None
        if known is not None and self._is_late(word, known, linked):
            # Or the clock was set back and Redis emptied, so that this is the later start: then nobody else is heard.
            return self._linger(replica_id, known, linked == known.start_id != "") or heard
        self._missing_since.pop(replica_id, None)
        return heard

    def _is_late(self, word: Member | Withdrawn, known: Member, linked: str | None) -> bool:
        """Whether the word is of a start before the known one. Who is connected (`linked`) knows which one lives; else
        the epoch says it."""
        if word.start_id and word.start_id == known.start_id:
            return False
        if word.start_id and word.start_id == linked:
            self._overruled[word.replica_id] = known.start_id
            return False
        if word.start_id and linked == known.start_id and word.start_id == self._overruled.get(word.replica_id):
            return True
        return word.epoch < known.epoch

    def _linger(self, replica_id: str, known: Member | None, is_connected: bool) -> Member | None:
        """A member of which Redis has nothing, or nothing new: for `ttl_s`, and while somebody is connected to it."""
        now = self._options.clock()
        if known is not None and is_connected:
            self._missing_since.pop(replica_id, None)
            return known
        if known is not None and now - self._missing_since.setdefault(replica_id, now) < self._options.ttl_s:
            return known
        self._missing_since.pop(replica_id, None)
        return None

    async def _prune(self, gone: list[str]) -> None:
        """Takes ids out of the index that stand for nothing; a live replica puts its own back with its next word."""
        if gone:
            with contextlib.suppress(StoreError):
                await self._store.execute("SREM", self._index, *gone)

    def _publish(self, members: dict[str, Member]) -> None:
        if members == self._members:
            return
        self._members = MappingProxyType(members)
        log.info("members: %s", ", ".join(members) or "none")
        for callback in self._callbacks:
            try:
                callback(self._members)
            except Exception:  # our bug, but the watch must outlive it
                log.exception("a member callback failed")


def read_word(store: Store, key: str, raw: Reply) -> Member | Withdrawn | None:
    """What stands at a member's key; None for nothing, or nothing that makes sense."""
    if isinstance(raw, bytes):
        with contextlib.suppress(BadValueError):
            word: Member | Withdrawn = store.decode(key, raw, _decoder)
            return word
    return None


def _good(reply: Reply) -> Reply:
    """Raises StoreReplyError."""
    if isinstance(reply, StoreReplyError):
        raise reply
    return reply


def _names(reply: Reply) -> set[str]:
    """The ids in the index; those that cannot be ids are left out."""
    names = set()
    for raw in reply:
        with contextlib.suppress(UnicodeDecodeError):
            names.add(raw.decode())
    if len(names) > MAX_MEMBERS:
        raise StoreReplyError(f"the member index holds {len(names)} ids, at most {MAX_MEMBERS} make sense")
    return names


async def _stop(task: asyncio.Task[None]) -> None:
    """Cancels until it is over: a library in between may swallow one cancellation (asyncio.wait_for did)."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.1)
