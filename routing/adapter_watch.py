"""Each process's own copy of the catalogue of adapters, kept fresh in the background."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from routing.adapters import AdapterRegistry, Catalogue, Entry
from routing.store import Store, StoreError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWatchOptions:
    """Seconds. News are looked for every `poll_s`; the whole is read anew every `reread_s` in any case. `wall_clock`:
    Unix seconds."""

    poll_s: float = 0.25
    reread_s: float = 30.0
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time


class AdapterWatch:
    """A process's copy of the catalogue, kept fresh by a task of its own; reading it never waits.

    While Redis cannot be asked, the last copy stays; what Redis has lost is put back. `own`: entries that need no
    Redis (a profile's). `on_change` is called when the copy is another one.
    """

    def __init__(self, store: Store, own: Sequence[Entry] = (), options: AdapterWatchOptions | None = None) -> None:
        self._options = options or AdapterWatchOptions()
        self._store = store
        self._registry = AdapterRegistry(store, self._options.wall_clock)
        self._own = {entry.adapter.adapter_id: entry for entry in own}
        self._shared: dict[str, Entry] = {}
        self._catalogue = Catalogue(own)
        self._stamp: bytes | None = None
        self._read_at: float | None = None
        self._task: asyncio.Task[None] | None = None
        self.on_change: Callable[[], None] = lambda: None

    @property
    def catalogue(self) -> Catalogue:
        return self._catalogue

    def start(self) -> None:
        """Begins to watch; returns at once. Call it once."""
        assert self._task is None, "the watch runs already"
        self._task = asyncio.create_task(self._keep(), name="watch adapters")

    async def close(self) -> None:
        """Stops watching; the last copy stays readable. Idempotent."""
        if self._task is not None:
            task, self._task = self._task, None
            while not task.done():  # a library in between may swallow one cancellation
                task.cancel()
                await asyncio.wait([task], timeout=0.1)

    async def refresh(self) -> None:
        """Looks for news once. Raises StoreError, then nothing has changed."""
        stamp = await self._registry.stamp()
        now = self._options.clock()
        due = self._read_at is None or now - self._read_at >= self._options.reread_s
        if stamp == self._stamp and not due:
            return
        found = await self._registry.read()
        self._stamp, self._read_at = stamp, now
        newer = {i: e for i, e in self._shared.items() if i not in found or found[i].at_us < e.at_us}
        stale = self._registry.forgotten({**found, **newer})
        lost = [e for i, e in newer.items() if i not in stale]
        merged = {**found, **{entry.adapter.adapter_id: entry for entry in lost}}
        if merged != self._shared:
            self._shared = merged
            self._catalogue = Catalogue({**self._own, **merged}.values())
            log.info("adapters: %d", len(self._catalogue))
            self.on_change()
        if lost:
            log.warning("Redis has lost %d adapters: putting them back", len(lost))
            await self._registry.write(lost)

    async def _keep(self) -> None:
        while True:
            try:
                await self.refresh()
            except StoreError as error:
                log.debug("keeping %d known adapters: %s", len(self._catalogue), error)
            await self._store.beat(self._options.poll_s)
