"""The catalogue of LoRA adapters: which there are, of which model, whose; shared through Redis, copied into memory.

    wg:{cluster}:adapters         hash: name@version → JSON of an entry (adapter, when it was written, whether removed)
    wg:{cluster}:adapters:failures  hash: name → JSON of why its last attempt to be added failed
    wg:{cluster}:adapters:stamp   changes with every write, so that watchers read the hash only when there is news

Entries are last-writer-wins by their time, and a removal is an entry as well: so copies can be merged in any order. A
watcher that finds an entry missing or older than its own puts it back: a Redis that was emptied loses no adapter.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from configs.schema import AdapterConfig, ModelId, Name
from routing.store import BadValueError, Command, Reply, Store, StoreReplyError

MAX_ADAPTERS = 10_000
MAX_FAILURES = 1_000
MAX_REMOVALS = 2 * MAX_ADAPTERS
"""The newest are remembered."""

MAX_ENTRIES = 4 * MAX_ADAPTERS
"""Removals included: a hash that has more was not written by us."""

FORGET_S = 6 * 3600.0
"""How long a removal is remembered. A watcher that was cut off from Redis for longer may bring the adapter back."""

FORGOTTEN = "warmgate:forgotten"
"""A name no adapter may have: its removals say how high the version numbers of forgotten adapters went."""

_MAX_DIGITS = 15
"""A version of more digits is a name, not one of the numbers that are counted on."""

_OFFERED_US = -1
"""Older than anything written or declared: not yet what its name means."""


class Adapter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A LoRA adapter. `path`: where replicas find it; `owner`: the one tenant that may use it, None for all.

    A version names one set of weights for ever: caches are keyed by it. `digest` (`configs.lora`) lets replicas see
    that its files are still those; empty where nobody looked. Replicas keep a `pinned` one once they have it. `source`:
    the URL of the source that brought it (`routing.adapter_sources`), empty where somebody added it.
    """

    name: ModelId
    base_model: ModelId
    version: Name = "1"
    path: str = ""
    rank: Annotated[int, Meta(ge=1, le=512)] = 8
    owner: Name | None = None
    num_bytes: Annotated[int, Meta(ge=0)] = 0
    digest: str = ""
    pinned: bool = False
    source: str = ""

    @property
    def adapter_id(self) -> str:
        """`name@version`, what travels with requests and separates caches."""
        return f"{self.name}@{self.version}"


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was last written about one version. `at_us`: Unix microseconds."""

    adapter: Adapter
    at_us: int
    removed: bool = False


Entries: TypeAlias = Mapping[str, Entry]
"""By `name@version`."""

_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Entry)


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a name, or a new version of it, could not be added. `at`: Unix seconds."""

    name: ModelId
    path: str
    message: str
    at: float


_failure_decoder = msgspec.json.Decoder(Failure)


class AdapterConflictError(ValueError):
    """This version exists with other weights, or there is no such adapter to remove."""


class Catalogue:
    """The adapters there are, at one moment. Of several versions of a name the last one written is the current one."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        live = sorted((e for e in entries if not e.removed), key=lambda e: (e.at_us, e.adapter.adapter_id))
        self._by_id = {e.adapter.adapter_id: e.adapter for e in live}
        self._by_name = {e.adapter.name: e.adapter for e in live if e.at_us != _OFFERED_US}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Adapter]:
        """Every version, by name."""
        return iter(sorted(self._by_id.values(), key=lambda a: (a.name, a.version)))

    def current(self) -> list[Adapter]:
        """One adapter a name, the one that the name alone means."""
        return sorted(self._by_name.values(), key=lambda a: a.name)

    def named(self, name: str) -> Adapter | None:
        """What a client means by `name` or `name@version`."""
        return self._by_name.get(name) or self._by_id.get(name)

    def find(self, adapter_id: str) -> Adapter | None:
        """The adapter of a `name@version`."""
        return self._by_id.get(adapter_id)

    def versions(self, name: str) -> list[Adapter]:
        """Every version of a name, the one written last at the end."""
        return [adapter for adapter in self._by_id.values() if adapter.name == name]


EMPTY = Catalogue(())


def declared(adapters: Sequence[AdapterConfig]) -> list[Entry]:
    """A profile's adapters as entries older than any that was written, the last of a name the current one."""
    return [
        Entry(adapter=Adapter(**msgspec.structs.asdict(config)), at_us=order) for order, config in enumerate(adapters)
    ]


class AdapterRegistry:
    """Reads and writes the shared catalogue; for the command line and for tests of it. `wall_clock`: Unix seconds."""

    def __init__(self, store: Store, wall_clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._wall_clock = wall_clock
        self._key = store.keys("adapters")
        self._stamp_key = store.keys("adapters", "stamp")
        self._failures_key = store.keys("adapters", "failures")

    async def stamp(self) -> bytes | None:
        """What changes with every write. Raises StoreError."""
        found: bytes | None = await self._store.execute("GET", self._stamp_key)
        return found

    async def read(self) -> dict[str, Entry]:
        """Every entry, removals included; those that make no sense are left out. Raises StoreError."""
        reply: Reply = await self._store.execute("HGETALL", self._key)
        if len(reply) > MAX_ENTRIES:
            raise StoreReplyError(f"the catalogue has {len(reply)} entries, at most {MAX_ENTRIES} make sense")
        entries: dict[str, Entry] = {}
        for raw_id, raw in reply.items():
            with contextlib.suppress(BadValueError, UnicodeDecodeError):
                adapter_id = raw_id.decode()
                entry = self._store.decode(f"{self._key}[{adapter_id}]", raw, _decoder)
                if entry.adapter.adapter_id == adapter_id:
                    entries[adapter_id] = entry
        return entries

    def forgotten(self, entries: Entries) -> set[str]:
        """Removals that need not be kept: old ones, and the oldest of too many."""
        horizon_us, floor = (self._wall_clock() - FORGET_S) * 1e6, version_floor(entries)
        removals = {i: e for i, e in entries.items() if e.removed}
        lower = {i for i, e in removals.items() if e.adapter.name == FORGOTTEN}
        plain = sorted(removals.keys() - lower, key=lambda i: -removals[i].at_us)
        old = {i for i in plain if removals[i].at_us < horizon_us}
        return (lower - {f"{FORGOTTEN}@{floor}"}) | old | set(plain[MAX_REMOVALS:])

    async def write(self, entries: Iterable[Entry], known: Entries | None = None) -> None:
        """Writes entries as they are, and drops what is forgotten of the `known` ones, but for the highest number that
        a version had. Raises StoreError."""
        new = {e.adapter.adapter_id: e for e in entries}
        commands: list[Command] = []
        if known is not None:
            after = {**known, **new}
            stale = self.forgotten(after) - new.keys()
            floor = max((_number(after[i].adapter.version) for i in stale), default=0)
            if floor > version_floor(after):
                mark = Adapter(name=FORGOTTEN, base_model=FORGOTTEN, version=str(floor))
                new[mark.adapter_id] = Entry(adapter=mark, at_us=self._next_us(after), removed=True)
                stale |= self.forgotten({**after, **new}) - new.keys()
            commands += [("HDEL", self._key, *sorted(stale))] if stale else []
        commands = [*(("HSET", self._key, i, _encode(e)) for i, e in new.items()), *commands]
        replies = await self._store.pipeline([*commands, ("SET", self._stamp_key, secrets.token_hex(8))])
        for reply in replies:
            if isinstance(reply, StoreReplyError):
                raise reply

    async def add(self, adapter: Adapter) -> None:
        """Adds a version and makes it its name's current one; one that was there before becomes current again.

        Raises AdapterConflictError when that version has, or had, other weights; StoreError.
        """
        entries = await self.read()
        _check_room(adapter, entries)
        await self.write([Entry(adapter=adapter, at_us=self._next_us(entries))], entries)

    async def offer(self, adapter: Adapter) -> None:
        """Adds a version that only its own `name@version` means: to be tried before it is added.

        Raises AdapterConflictError when that version has, or had, other weights; StoreError.
        """
        entries = await self.read()
        _check_room(adapter, entries)
        await self.write([Entry(adapter=adapter, at_us=_OFFERED_US)], entries)

    async def remove(self, name: str, declared: Iterable[Adapter] = ()) -> list[Adapter]:
        """Removes `name@version`, or every version of `name`, those of the profile's that are `declared` as well;
        returns what was removed.

        Raises AdapterConflictError when there is none; StoreError.
        """
        entries = await self.read()
        live = {i: e.adapter for i, e in entries.items() if not e.removed}
        own = {adapter.adapter_id: adapter for adapter in declared if adapter.adapter_id not in entries}
        gone = [adapter for i, adapter in {**own, **live}.items() if name in (i, adapter.name)]
        if not gone:
            raise AdapterConflictError(f"there is no adapter {name!r} in the registry")
        at_us = self._next_us(entries)
        await self.write([Entry(adapter=adapter, at_us=at_us, removed=True) for adapter in gone], entries)
        return gone

    async def note_failure(self, failure: Failure) -> None:
        """Remembers why the last attempt to add a name failed. Raises StoreError."""
        await self._store.pipeline(
            [
                ("HSET", self._failures_key, failure.name, msgspec.json.encode(failure)),
                ("EXPIRE", self._failures_key, int(FORGET_S)),
            ]
        )

    async def forget_failure(self, name: str) -> None:
        """The name was added, or removed. Raises StoreError."""
        await self._store.execute("HDEL", self._failures_key, name)

    async def failures(self) -> dict[str, Failure]:
        """The last failure of every name whose last attempt failed. Raises StoreError."""
        reply: Reply = await self._store.execute("HGETALL", self._failures_key)
        found: dict[str, Failure] = {}
        for raw_name, raw in list(reply.items())[:MAX_FAILURES]:
            with contextlib.suppress(BadValueError, UnicodeDecodeError):
                failure = self._store.decode(f"{self._failures_key}[{raw_name!r}]", raw, _failure_decoder)
                found[raw_name.decode()] = failure
        return found

    def _next_us(self, entries: Entries) -> int:
        """Now, or later than everything written so far: a clock that is behind must not lose its write."""
        return max(round(self._wall_clock() * 1e6), 1 + max((e.at_us for e in entries.values()), default=0))


def next_version(name: str, entries: Entries, declared: Iterable[Adapter] = ()) -> str:
    """The next number that no version of a name has or ever had: caches and replicas may still know that one."""
    taken = [e.adapter.version for e in entries.values() if e.adapter.name == name]
    taken += [adapter.version for adapter in declared if adapter.name == name]
    return str(1 + max([version_floor(entries), *map(_number, taken)]))


def version_floor(entries: Entries) -> int:
    """The highest number that a version of a forgotten adapter had; 0 when nothing was forgotten."""
    return max((_number(e.adapter.version) for e in entries.values() if e.adapter.name == FORGOTTEN), default=0)


def _number(version: str) -> int:
    return int(version) if version.isdecimal() and len(version) <= _MAX_DIGITS else 0


def _check_room(adapter: Adapter, entries: Entries) -> None:
    if adapter.name == FORGOTTEN:
        raise AdapterConflictError(f"the name {FORGOTTEN!r} is reserved")
    known = entries.get(adapter.adapter_id)
    if known is not None and not _same_weights(known.adapter, adapter):
        raise AdapterConflictError(
            f"{adapter.adapter_id} exists with other weights ({_shown(known.adapter)}); give it a new version"
        )
    live = sum(not entry.removed for entry in entries.values())
    if live >= MAX_ADAPTERS and (known is None or known.removed):
        raise AdapterConflictError(f"the catalogue is full: {live} adapters; remove some that are not used any more")
    if known is None and len(entries) >= MAX_ENTRIES - MAX_REMOVALS // 4:
        raise AdapterConflictError(f"the catalogue is full: {len(entries)} entries, removals included")


def _same_weights(one: Adapter, other: Adapter) -> bool:
    digests = {one.digest, other.digest} - {""}
    return _weights(one) == _weights(other) and len(digests) < 2


def _weights(adapter: Adapter) -> tuple[str, str, int, int]:
    return adapter.base_model, adapter.path, adapter.rank, adapter.num_bytes


def _shown(adapter: Adapter) -> str:
    return f"base model {adapter.base_model}, rank {adapter.rank}, path {adapter.path or 'none'}"
