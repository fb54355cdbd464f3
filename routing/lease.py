"""One process of many does something, as long as it can say so in Redis.

    wg:{cluster}:lease:{name}     who holds it; gone `ttl_s` after its holder was last heard of

A holder that cannot reach Redis counts itself out before its key is gone: so at no time do two believe to hold it, as
far as their clocks run at the same pace.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from routing.store import Store, StoreError

log = logging.getLogger(__name__)

_HOLD = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_LEAVE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseOptions:
    """Seconds. `clock`: monotonic."""

    ttl_s: float = 10.0
    clock: Callable[[], float] = time.monotonic

    @property
    def renew_s(self) -> float:
        return self.ttl_s / 4


class Lease:
    """Tries to hold, and goes on holding, the lease of a name; `holder` is unique to this process."""

    def __init__(self, store: Store, name: str, holder: str, options: LeaseOptions | None = None) -> None:
        self._store = store
        self._key = store.keys("lease", name)
        self._holder = holder
        self._options = options or LeaseOptions()
        self._until = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def held(self) -> bool:
        """Whether nobody else can hold it now."""
        return self._options.clock() < self._until

    def start(self) -> None:
        """Begins to try; returns at once. Call it once."""
        assert self._task is None, "it runs already"
        self._task = asyncio.create_task(self._keep(), name=f"lease {self._key}")

    async def close(self) -> None:
        """Gives it back, so that another process need not wait. Idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        while not task.done():  # a library in between may swallow one cancellation
            task.cancel()
            await asyncio.wait([task], timeout=0.1)
        self._until = 0.0
        with contextlib.suppress(StoreError):  # whatever is known here: an attempt under way may have succeeded
            await self._store.execute("EVAL", _LEAVE, 1, self._key, self._holder)

    async def try_to_hold(self) -> None:
        """Once. Raises StoreError."""
        asked_at = self._options.clock()
        was_held = self.held
        ttl_ms = max(1, round(self._options.ttl_s * 1000))
        if await self._store.execute("EVAL", _HOLD, 1, self._key, self._holder, ttl_ms):
            self._until = asked_at + self._options.ttl_s - self._options.renew_s / 2
        else:
            self._until = 0.0
        if self.held != was_held:
            log.info("%s is %s", self._key, "held by this process" if self.held else "another process's now")

    async def _keep(self) -> None:
        while True:
            try:
                await self.try_to_hold()
            except StoreError as error:
                log.debug("%s cannot be renewed: %s", self._key, error)
            await asyncio.sleep(self._options.renew_s)
