"""Counts that ingresses keep together: each tells what it has added, and adds what the others tell. Nobody waits.

    wg:{cluster}:counts     hash: ingress id → its signed record, written anew several times a second

    record   number │ period │ gauges (key, value) │ tallies (key, era, total)
                                                      a tally that was forgotten counts from 0 again: a new era

A reader adds the difference to the record it read before. So a record that is lost or read twice costs nothing, and one
that is gone (Redis emptied, its ingress dead) takes nothing back. What is added before an ingress is first heard of is
its past. No clock is compared with another: an ingress is silent when its record's number has stood still here, for
longer than it and this one take between two records.

Records are signed with the cluster secret: what others write into the hash is no record.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import TypeAlias

import msgspec

from routing.store import BadValueError, Store, StoreError, StoreReplyError

log = logging.getLogger(__name__)

Key: TypeAlias = tuple[str, ...]
"""What is counted, from the general to the particular: kind, model, tenant."""

MAX_KEYS = 8192
"""Keys that an ingress has to tell; those that were added to last."""

MAX_NUMBERS = 4096
"""Ingresses whose last number is remembered although they are gone, so that no old record of theirs counts again."""

MAX_PERIOD_S = 60.0

MAX_INGRESSES = 256
MAX_RECORD_BYTES = 4 * 1024 * 1024
SIGNATURE_BYTES = 16
SLOW_BYTES = 256 * 1024
"""Reading so much takes twice the period, more of it longer in proportion."""


class _Record(msgspec.Struct, frozen=True, array_like=True):
    """`number` grows with each; `period_s`: about how long it is until the next; `tallies` by key: (era, total)."""

    number: int
    period_s: float
    gauges: list[tuple[Key, float]]
    tallies: list[tuple[Key, int, float]]


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(_Record)


@dataclass(slots=True)
class _Tally:
    """`told_at`: since when Redis has had this total; infinity before."""

    era: int
    total: float = 0.0
    told_at: float = inf


@dataclass(slots=True)
class _Other:
    """What was last heard of another ingress. `tallies`: (era, total) by key."""

    period_s: float
    heard_at: float
    gauges: dict[Key, float] = field(default_factory=dict)
    tallies: dict[Key, tuple[int, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedCountsOptions:
    """Seconds. A record is written every `period_s`; what has not changed is told for `told_s`. An ingress silent for
    `fresh_s` has no gauges any more, one silent for `gone_s` is forgotten by all. When records are so large that they
    are written less often, all these grow with the period."""

    period_s: float = 0.25
    told_s: float = 2.0
    fresh_s: float = 1.0
    gone_s: float = 60.0
    clock: Callable[[], float] = time.monotonic


class SharedCounts:
    """One ingress's part. `secret`: the cluster's.

    `on_added(key, amount)` hears what others have added; `gauges` is asked for this ingress's own at each writing;
    `on_heard` is called after each reading, failed ones too: others that cannot be heard fall silent.
    """

    def __init__(self, store: Store, own_id: str, secret: bytes, options: SharedCountsOptions | None = None) -> None:
        self.on_added: Callable[[Key, float], None] = lambda key, amount: None
        self.on_heard: Callable[[], None] = lambda: None
        self.gauges: Callable[[], Mapping[Key, float]] = dict
        self.num_bytes = 0
        self._store = store
        self._own_id = own_id
        self._secret = secret
        self._options = options or SharedCountsOptions()
        self._clock = self._options.clock
        self._key = store.keys("counts")
        self._number = 0
        self._tallies: OrderedDict[Key, _Tally] = OrderedDict()
        self._others: dict[str, _Other] = {}
        self._numbers: OrderedDict[str, int] = OrderedDict()
        self._task: asyncio.Task[None] | None = None

    def add(self, key: Key, amount: float) -> None:
        """Something more to tell. O(1), and never waits. Of more than MAX_KEYS keys the stillest is forgotten."""
        tally = self._tallies.pop(key, None)
        if tally is None:
            tally = _Tally(self._number + 1)
        tally.total += amount
        tally.told_at = inf
        self._tallies[key] = tally  # the last that was added to is the last of all
        if len(self._tallies) > MAX_KEYS:
            self._tallies.popitem(last=False)

    def others(self, key: Key) -> Iterator[float]:
        """What the gauge is at each ingress that has one and is not silent."""
        for other in self._speaking():
            if (value := other.gauges.get(key)) is not None:
                yield value

    def all_others(self) -> Iterator[tuple[Key, float]]:
        """Every gauge of every ingress that is not silent."""
        for other in self._speaking():
            yield from other.gauges.items()

    def _speaking(self) -> Iterator[_Other]:
        now = self._clock()
        for other in self._others.values():
            if now - other.heard_at <= self._options.fresh_s * self._slowness(other.period_s):
                yield other

    @property
    def num_others(self) -> int:
        """Ingresses heard of, silent ones included."""
        return len(self._others)

    def start(self) -> None:
        """Begins to tell and to listen; returns at once. Call it once."""
        assert self._task is None, "the counts are shared already"
        self._task = asyncio.create_task(self._keep(), name="share counts")

    async def close(self) -> None:
        """Stops, and leaves no record behind if Redis can be reached. Idempotent."""
        if self._task is None:
            return
        task, self._task = self._task, None
        while not task.done():  # a library in between may swallow one cancellation
            task.cancel()
            await asyncio.wait([task], timeout=0.1)
        try:
            await self._store.execute("HDEL", self._key, self._own_id)
        except StoreError as error:
            log.debug("the last counts stay until they are forgotten: %s", error)

    async def refresh(self) -> None:
        """Tells and listens once. Raises StoreError; what could not be told is told the next time."""
        try:
            await self._exchange()
        finally:
            self.on_heard()

    async def _exchange(self) -> None:
        record = self._record()
        told, _, heard = await self._store.pipeline(
            [
                ("HSET", self._key, self._own_id, self._signed(self._own_id, _encode(record))),
                ("PEXPIRE", self._key, round(10_000 * self._options.gone_s)),
                ("HGETALL", self._key),
            ]
        )
        if isinstance(heard, StoreReplyError):
            if str(heard).startswith("WRONGTYPE"):  # somebody put a value of another type there
                await self._store.execute("DEL", self._key)
            raise heard
        gone = self._read(heard)
        if isinstance(told, StoreReplyError):  # no memory left, no right to write: the others are heard all the same
            raise told
        self._note_told(record)
        await self._forget_gone(gone)

    async def _keep(self) -> None:
        while True:
            try:
                await self.refresh()
            except StoreError as error:
                log.debug("counting alone: %s", error)
            await self._store.beat(self._period_s)

    @property
    def _period_s(self) -> float:
        """Between two records: longer where there is much to read."""
        return min(self._options.period_s * (1 + self.num_bytes // SLOW_BYTES), MAX_PERIOD_S)

    def _slowness(self, period_s: float) -> float:
        """By how much longer all takes between this ingress and one of this period."""
        return max(1.0, max(period_s, self._period_s) / self._options.period_s)

    # What is told.

    def _record(self) -> _Record:
        self._number += 1
        self._forget_still(self._clock())
        tallies = [(key, tally.era, tally.total) for key, tally in self._tallies.items()]
        gauges = [(key, value) for key, value in self.gauges().items() if isfinite(value)]
        return _Record(self._number, self._period_s, gauges, tallies)

    def _forget_still(self, now: float) -> None:
        """Those that were told for long enough, and were not added to since."""
        slowness = max((self._slowness(other.period_s) for other in self._others.values()), default=1.0)
        still = now - self._options.told_s * slowness
        while self._tallies and next(iter(self._tallies.values())).told_at < still:
            self._tallies.popitem(last=False)

    def _note_told(self, record: _Record) -> None:
        """Redis has it. What was added to while it was written is still to be told."""
        now = self._clock()
        for key, era, total in record.tallies:
            tally = self._tallies.get(key)
            if tally is not None and tally.told_at == inf and (tally.era, tally.total) == (era, total):
                tally.told_at = now

    def _signed(self, ingress_id: str, payload: bytes) -> bytes:
        return self._signature(ingress_id, payload) + payload

    def _signature(self, ingress_id: str, payload: bytes) -> bytes:
        message = b"counts|" + ingress_id.encode() + b"|" + payload
        return hmac.digest(self._secret, message, "sha256")[:SIGNATURE_BYTES]

    # What is heard.

    def _read(self, fields: Mapping[bytes, bytes]) -> list[bytes]:
        """Takes in every record; returns the names of those to be deleted."""
        self.num_bytes = sum(map(len, fields.values()))
        gone: list[bytes] = []
        now = self._clock()
        for raw_id, raw in fields.items():
            ingress_id = raw_id.decode(errors="replace")
            if ingress_id == self._own_id:
                continue
            record = self._checked(ingress_id, raw)
            if record is None:
                gone.append(raw_id)
                continue
            other = self._others.get(ingress_id)
            if record.number > self._numbers.get(ingress_id, 0):
                self._take(ingress_id, record, now)
            elif other is None or self._is_gone(other, now):
                gone.append(raw_id)
        for ingress_id in [i for i, o in self._others.items() if self._is_gone(o, now)]:
            del self._others[ingress_id]
        return gone

    def _is_gone(self, other: _Other, now: float) -> bool:
        return now - other.heard_at > self._options.gone_s * self._slowness(other.period_s)

    def _checked(self, ingress_id: str, raw: bytes) -> _Record | None:
        """The record, or None for what is none."""
        if len(raw) > MAX_RECORD_BYTES or (ingress_id not in self._others and len(self._others) >= MAX_INGRESSES):
            return None
        signature, payload = raw[:SIGNATURE_BYTES], raw[SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._signature(ingress_id, payload)):
            return None
        try:
            return self._store.decode(f"{self._key}[{ingress_id}]", payload, _decoder)
        except BadValueError:
            return None

    def _take(self, ingress_id: str, record: _Record, now: float) -> None:
        before = self._others.get(ingress_id)
        period_s = min(record.period_s, MAX_PERIOD_S) if isfinite(record.period_s) else MAX_PERIOD_S
        other = self._others[ingress_id] = _Other(period_s, now, dict(record.gauges))
        self._numbers[ingress_id] = record.number
        self._numbers.move_to_end(ingress_id)
        if len(self._numbers) > MAX_NUMBERS:
            self._numbers.popitem(last=False)
        for key, era, total in record.tallies:
            other.tallies[key] = (era, total)
            if before is None:
                continue
            known_era, known = before.tallies.get(key, (era, 0.0))
            amount = total - known if known_era == era else total
            if amount and isfinite(amount):
                self.on_added(key, amount)

    async def _forget_gone(self, gone: list[bytes]) -> None:
        if gone:
            log.debug("forgetting %d records of ingresses that are gone, or are none", len(gone))
            await self._store.execute("HDEL", self._key, *gone)
