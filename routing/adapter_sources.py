"""What sources of adapters had at the last look: for whoever looks next, for the command line, for metrics.

    wg:{cluster}:adapters:sources           hash: URL → JSON of a status
    wg:{cluster}:adapters:source:{digest}   hash: folder → JSON of what became of it; of one source

A source is `configs.adapters.sections.AdapterSourceConfig`. That nothing is known here means that everything is looked
at anew: no adapter is lost by it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Set

import msgspec
import xxhash

from routing.store import BadValueError, Command, Reply, Store, StoreReplyError

MAX_FOLDERS = 20_000


class FolderRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of a folder with this fingerprint: the adapter it was added as, or why it was not. `at`: Unix
    seconds."""

    fingerprint: str
    at: float
    adapter_id: str = ""
    failure: str = ""


class SourceStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a source is doing. `looked_at`: Unix seconds of the last look that saw something, 0 for none; `error`: why
    the newest did not. `identity`: of the folder in which adapters were seen (`configs.adapters.remote.Look`).
    `failed`: folders that are no adapters, and why."""

    url: str
    base_model: str
    looked_at: float = 0.0
    error: str = ""
    identity: str = ""
    num_adapters: int = 0
    num_waiting: int = 0
    failed: dict[str, str] = {}


_status_decoder = msgspec.json.Decoder(SourceStatus)
_record_decoder = msgspec.json.Decoder(FolderRecord)


class SourceBoard:
    """Reads and writes what is known of sources. Every method raises StoreError."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._key = store.keys("adapters", "sources")

    async def statuses(self) -> dict[str, SourceStatus]:
        """By URL."""
        reply: Reply = await self._store.execute("HGETALL", self._key)
        found: dict[str, SourceStatus] = {}
        for raw_url, raw in reply.items():
            with contextlib.suppress(BadValueError, UnicodeDecodeError):
                url = raw_url.decode()
                found[url] = self._store.decode(f"{self._key}[{url}]", raw, _status_decoder)
        return found

    async def tell(self, status: SourceStatus) -> None:
        """How a source is doing now."""
        await self._run([("HSET", self._key, status.url, msgspec.json.encode(status))])

    async def folders(self, url: str) -> dict[str, FolderRecord]:
        """By name."""
        key = self._folders_key(url)
        reply: Reply = await self._store.execute("HGETALL", key)
        found: dict[str, FolderRecord] = {}
        for raw_name, raw in list(reply.items())[:MAX_FOLDERS]:
            with contextlib.suppress(BadValueError, UnicodeDecodeError):
                name = raw_name.decode()
                found[name] = self._store.decode(f"{key}[{name}]", raw, _record_decoder)
        return found

    async def note(self, url: str, changed: Mapping[str, FolderRecord | None]) -> None:
        """What became of folders; None: there is none of that name any more."""
        key = self._folders_key(url)
        gone = [name for name, record in changed.items() if record is None]
        commands: list[Command] = [("HDEL", key, *gone)] if gone else []
        commands += [("HSET", key, name, msgspec.json.encode(r)) for name, r in changed.items() if r is not None]
        await self._run(commands)

    async def keep_only(self, urls: Set[str]) -> None:
        """Forgets sources that no profile has any more."""
        others = (await self.statuses()).keys() - urls
        await self._run([c for url in others for c in (("HDEL", self._key, url), ("DEL", self._folders_key(url)))])

    def _folders_key(self, url: str) -> str:
        return self._store.keys("adapters", "source", xxhash.xxh3_64(url.encode()).hexdigest())

    async def _run(self, commands: list[Command]) -> None:
        if commands:
            for reply in await self._store.pipeline(commands):
                if isinstance(reply, StoreReplyError):
                    raise reply
