"""Sources of adapters, watched: the catalogue follows what is in them. Of all ingresses one does it at a time.

    look (a thread) ─► plan (pure) ─► load: as an administrator would, trial on a replica included ─► noted
                                  └─► remove: requests under way end as they would have

Whatever cannot be reached, source, Redis or replicas, changes nothing: the next look tries again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from time import time

import msgspec

from configs.adapters.place import Remote, place_of
from configs.adapters.remote import Look, UnreachableError, look
from configs.lora import LoraError
from configs.schema import AdapterSourceConfig
from gateway.adapter_admin import AdapterAdmin, NewAdapter
from gateway.errors import (
    AdapterLoadingError,
    AdapterSlotsBusyError,
    AdapterUnreachableError,
    ApiError,
    BadRequestError,
    DeadlineError,
    InternalError,
    NotFoundError,
    ReplicaLostError,
)
from gateway.source_plan import Plan, Seen, is_taken, plan
from gateway.types import Tenant
from routing.adapter_sources import FolderRecord, SourceBoard, SourceStatus
from routing.adapter_watch import AdapterWatch
from routing.lease import Lease
from routing.store import StoreError

logger = logging.getLogger("warmgate.adapters")

MAX_TRIALS = 4
"""Adapters of one source that are tried at a time."""


@dataclass(frozen=True, slots=True)
class SourceTools:
    """What a source's keeper works with. `tenant`: in whose name trials run. `draw`: a new request id. `wall`: Unix
    seconds."""

    admin: AdapterAdmin
    watch: AdapterWatch
    board: SourceBoard
    lease: Lease
    tenant: Tenant
    draw: Callable[[], str]
    wall: Callable[[], float] = time


@dataclass(slots=True)
class SourceCounts:
    """Of this process, for metrics. `seen_at`: Unix seconds of the last look that saw something."""

    looks: dict[str, int] = field(default_factory=lambda: {"ok": 0, "unreachable": 0})
    changes: dict[str, int] = field(default_factory=lambda: {"added": 0, "failed": 0, "removed": 0})
    seen_at: float = 0.0
    reachable: bool = True
    num_failed: int = 0
    num_waiting: int = 0


AWAY_S = 60.0
"""When to ask again for one adapter whose files could not be read though the source could."""

FORGET_PERIOD_S = 60.0


_LATER = (AdapterUnreachableError, AdapterLoadingError, AdapterSlotsBusyError, DeadlineError)
"""What passes, and says nothing of the other folders."""


class _NotNowError(Exception):
    """Nothing can be tried now: no replica, no Redis, or the lease is another's."""


class SourceKeeper:
    """One source. `look_once` never raises but when cancelled. `others`: URLs of all other sources."""

    def __init__(self, source: AdapterSourceConfig, tools: SourceTools, others: frozenset[str] = frozenset()) -> None:
        self.source = source
        self._others = others
        self.counts = SourceCounts()
        place = place_of(source.url)
        assert isinstance(place, Remote), "configs.check has looked"
        self._place = place
        self._tools = tools
        self._before: dict[str, str] | None = None
        self._looking: asyncio.Future[Look] | None = None
        self._identity = ""
        self._away: dict[str, tuple[float, str]] = {}  # folder → until when, why
        self._thread = ThreadPoolExecutor(1, "adapter-source")
        self._said: dict[str, str] = {}

    def close(self) -> None:
        """Looks no more; a look under way ends by itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def look_once(self) -> None:
        """Looks, and does what follows from it."""
        if not self._tools.lease.held:
            self._before = None
            return
        try:
            await self._look_once()
        except StoreError as error:
            logger.debug("source %s: %s", self.source.url, error)
        except _NotNowError as error:
            self._say("", f"is left for now: {error}")
        except Exception:
            logger.exception("source %s", self.source.url)

    async def _look_once(self) -> None:
        board, url = self._tools.board, self.source.url
        await self._tools.watch.refresh()
        status = (await board.statuses()).get(url) or self._new_status()
        try:
            seen = await self._look(status)
        except (UnreachableError, LoraError) as error:
            await self._unreachable(status, str(error))
            return
        known = await board.folders(url)
        self.counts.looks["ok"] += 1
        self.counts.reachable, self.counts.seen_at = True, self._tools.wall()
        compared = Seen(seen.folders, self._before, known, self._others)
        chosen = plan(self.source, compared, self._tools.watch.catalogue, self._tools.wall())
        self._before = dict(seen.folders)
        for name, why in chosen.refuse.items():
            self._say(name, f"is not added: {why}")
        self._said = {name: words for name, words in self._said.items() if not name or name in seen.folders}
        try:
            await self._act(chosen)
        finally:
            with contextlib.suppress(StoreError):
                await self._tell(chosen, seen)
        self._said.pop("", None)  # whatever was told of the source itself is over

    async def _look(self, status: SourceStatus) -> Look:
        """Raises UnreachableError, also where a folder is there and empty that is not the one adapters were seen in."""
        if self._looking is None or self._looking.done():  # else the last look still hangs in its thread
            work = partial(look, self._place, self.source.timeout_s)
            self._looking = asyncio.get_running_loop().run_in_executor(self._thread, work)
            self._looking.add_done_callback(_heard)
        try:
            seen = await asyncio.wait_for(asyncio.shield(self._looking), self.source.timeout_s + 1.0)
        except TimeoutError:
            raise UnreachableError(f"{self.source.url} has not answered for {self.source.timeout_s:g} s") from None
        num_own = sum(adapter.source == self.source.url for adapter in self._tools.watch.catalogue.current())
        known = (status.identity, self._identity)  # Redis may have lost the one, a new process the other
        if not seen.folders and num_own and seen.identity and seen.identity not in known:
            raise UnreachableError(
                f"{self.source.url} is empty, and not the folder that {num_own} adapters came from: is it not mounted? "
                "They stay; remove them by hand if they are to go"
            )
        self._identity = seen.identity
        return seen

    async def _act(self, chosen: Plan) -> None:
        """Raises StoreError, _NotNowError: then some of it is done."""
        if chosen.forget:
            await self._tools.board.note(self.source.url, dict.fromkeys(chosen.forget))
            for name in chosen.forget:
                if not is_taken(self._tools.watch.catalogue.named(name), self._others):
                    with contextlib.suppress(ApiError):
                        await self._tools.admin.forget_failure(name)
        for name in chosen.remove:
            self._check_lease()
            if not await self._remove(name):
                raise _NotNowError("the registry of adapters cannot be reached")
        await self._load_all({n: f for n, f in chosen.load.items() if not self._is_away(n)})

    async def _load_all(self, folders: dict[str, str]) -> None:
        """A few at a time; the first that says that nothing can be tried now ends it for all."""
        gate = asyncio.Semaphore(MAX_TRIALS)
        tasks = [asyncio.create_task(self._load(n, f, gate), name=f"load {n}") for n, f in folders.items()]
        if not tasks:
            return
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            failed = [t.exception() for t in tasks if t.done() and not t.cancelled()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for error in failed:
            if error is not None:
                raise error

    def _is_away(self, name: str) -> bool:
        """Whether its files could not be read just now."""
        until, _ = self._away.get(name, (0.0, ""))
        return self._tools.wall() < until

    async def _remove(self, name: str) -> bool:
        """False where nobody can be asked."""
        if is_taken(self._tools.watch.catalogue.named(name), self._others):  # since it was planned
            return True
        try:
            await self._tools.admin.unload(name)
        except NotFoundError:
            return True
        except ApiError:
            return False
        self.counts.changes["removed"] += 1
        logger.info("source %s: %s is gone, so it is removed", self.source.url, name)
        return True

    async def _load(self, name: str, fingerprint: str, gate: asyncio.Semaphore) -> None:
        async with gate:
            self._check_lease()
            source, now = self.source, self._tools.wall
            asked = NewAdapter(
                name=name,
                path=f"{source.url}/{name}",
                base_model=source.base_model,
                owner=source.owner,
                pinned=source.pinned,
                replaces=True,
                source=source.url,
                allowed=lambda: self._tools.lease.held,
            )
            try:
                adapter = await self._tools.admin.load(asked, self._tools.tenant, self._tools.draw())
            except (BadRequestError, ReplicaLostError, InternalError) as error:  # it may be what ends engines
                record = FolderRecord(fingerprint=fingerprint, at=now(), failure=error.message)
                self.counts.changes["failed"] += 1
                self._say(name, f"is not added: {error.message}")
            except _LATER as error:  # this one's files, or its turn; the others may be had
                self._away[name] = (now() + AWAY_S, error.message)
                self._say(name, f"is left for now: {error.message}")
                return
            except ApiError as error:  # of the fleet or the store, not of the adapter
                raise _NotNowError(error.message) from error
            except StoreError:
                raise
            except Exception as error:  # our bug, but one folder's: the others must not wait for it
                logger.exception("source %s: %s", source.url, name)
                record = FolderRecord(fingerprint=fingerprint, at=now(), failure=f"{type(error).__name__}")
                self.counts.changes["failed"] += 1
            else:
                record = FolderRecord(fingerprint=fingerprint, at=now(), adapter_id=adapter.adapter_id)
                self.counts.changes["added"] += 1
                self._said.pop(name, None)
                logger.info("source %s: %s is %s now", source.url, name, adapter.adapter_id)
            await self._tools.board.note(source.url, {name: record})

    def _check_lease(self) -> None:
        if not self._tools.lease.held:
            raise _NotNowError("another ingress looks after it now")

    # What is told.

    async def _unreachable(self, status: SourceStatus, why: str) -> None:
        self.counts.looks["unreachable"] += 1
        self.counts.reachable = False
        self._before = None
        self._say("", f"cannot be read, and its adapters stay as they are: {why}")
        await self._tools.board.tell(msgspec.structs.replace(status, error=why))

    async def _tell(self, chosen: Plan, seen: Look) -> None:
        """For the command line, and for whoever looks next."""
        known = await self._tools.board.folders(self.source.url)
        failed = {name: known[name].failure for name in seen.folders if name in known and known[name].failure}
        self._away = {name: away for name, away in self._away.items() if name in seen.folders and self._is_away(name)}
        failed.update({name: why for name, (_, why) in self._away.items()} | chosen.refuse)
        num_own = sum(adapter.source == self.source.url for adapter in self._tools.watch.catalogue.current())
        self.counts.num_failed, self.counts.num_waiting = len(failed), chosen.num_waiting
        fresh = msgspec.structs.replace(
            self._new_status(),
            looked_at=self._tools.wall(),
            identity=seen.identity,
            num_adapters=num_own,
            num_waiting=chosen.num_waiting,
            failed=failed,
        )
        await self._tools.board.tell(fresh)

    def _new_status(self) -> SourceStatus:
        return SourceStatus(url=self.source.url, base_model=self.source.base_model)

    def _say(self, name: str, words: str) -> None:
        """Logs it, once. `name`: of a folder, or nothing for the source itself."""
        if self._said.get(name) != words:
            self._said[name] = words
            logger.warning("source %s: %s", self.source.url, f"{name} {words}".strip())


def _heard(looking: asyncio.Future[Look]) -> None:
    """Whatever a look came to that nobody waits for any more."""
    if not looking.cancelled():
        looking.exception()


class AdapterSources:
    """Every source of a profile, each with a task of its own. Nothing happens without the lease."""

    def __init__(self, sources: tuple[AdapterSourceConfig, ...], tools: SourceTools) -> None:
        self._urls = frozenset(source.url for source in sources)
        self.keepers = tuple(SourceKeeper(source, tools, self._urls - {source.url}) for source in sources)
        self._tools = tools
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to look; returns at once. Call it once."""
        if self.keepers:
            self._tools.lease.start()
            self._tasks = [asyncio.create_task(self._keep(k), name=f"source {k.source.url}") for k in self.keepers]
            self._tasks.append(asyncio.create_task(self._forget_others(), name="forget sources"))

    async def close(self) -> None:
        """Stops looking; the adapters stay. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=0.1)
        for keeper in self.keepers:
            keeper.close()
        if tasks:
            await self._tools.lease.close()

    async def _forget_others(self) -> None:
        """Sources that the profile has no more; their adapters stay until somebody removes them."""
        while True:
            await asyncio.sleep(FORGET_PERIOD_S)
            if self._tools.lease.held:
                with contextlib.suppress(StoreError):
                    await self._tools.board.keep_only(self._urls)

    async def _keep(self, keeper: SourceKeeper) -> None:
        while True:
            await keeper.look_once()
            held = self._tools.lease.held
            await asyncio.sleep(keeper.source.poll_s if held else min(keeper.source.poll_s, 1.0))
