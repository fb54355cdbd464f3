"""The connection to Redis (or Valkey): short timeouts, a circuit breaker, keys. The only importer of redis.

Nothing on the request path may await this module: what requests need is kept in memory, by tasks that read here. What
several of them ask in one turn of the event loop, or while an answer is under way, goes out together: a round trip
costs a process that is otherwise idle more than what is asked with it. `beat` wakes them in the same turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import random
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

log = logging.getLogger(__name__)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Command: TypeAlias = tuple[str | bytes | int | float, ...]
Reply: TypeAlias = Any
"""What RESP2 gives: bytes, int, None, or lists and sets of them."""

MAX_NOTED_VALUES = 1000

_PARTS = 4
"""A timeout passes in so many parts."""

_SOON_S = 0.002
"""A beat that near is the present one: timers of uvloop's fire up to half a millisecond early."""


class StoreError(Exception):
    """Root of what the store raises."""


class StoreUnavailableError(StoreError):
    """Redis is down, slow or frozen, or the breaker is open and nothing was tried."""


class StoreReplyError(StoreError):
    """Redis answered a command with an error; the connection is fine."""


class BadValueError(StoreError):
    """A value that is not what its key promises; logged and counted already."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Names keys `wg:{cluster}:part:part`. The braces are meant: on Redis Cluster they put a cluster's keys in one
    slot, so that one command may touch several."""

    cluster: str

    def __call__(self, *parts: str) -> str:
        return ":".join((f"wg:{{{self.cluster}}}", *parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """`timeout_s` bounds a round trip, of time in which this process could have read the answer; a call takes two at
    most, the one under way and its own. The breaker opens after `max_failures` in a row, and tries again with one every
    `open_s`."""

    timeout_s: float = 0.25
    max_failures: int = 3
    open_s: float = 1.0
    clock: Callable[[], float] = time.monotonic


class Breaker:
    """closed ─ max_failures in a row ─► open ─ open_s later, one call ─► half open ─ it succeeds ─► closed."""

    def __init__(self, options: StoreOptions) -> None:
        self._options = options
        self._num_failures = 0
        self._opened_at = 0.0
        self.state: Literal["closed", "open", "half_open"] = "closed"

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around one attempt; StoreUnavailableError inside counts as failure, raised at once while open."""
        self._enter()
        try:
            yield
        except StoreUnavailableError:
            self._failed()
            raise
        except BaseException:  # cancelled, or our bug: it says nothing about Redis, but a probe must not stay taken
            if self.state == "half_open":
                self.state = "open"
            raise
        self.state, self._num_failures = "closed", 0

    def _enter(self) -> None:
        if self.state == "closed":
            return
        waited_s = self._options.clock() - self._opened_at
        if self.state == "half_open" or waited_s < self._options.open_s:
            raise BreakerOpenError(f"breaker open for {waited_s:.2f} s after {self._num_failures} failures")
        self.state = "half_open"

    def _failed(self) -> None:
        self._num_failures += 1
        if self.state == "half_open" or self._num_failures >= self._options.max_failures:
            if self.state == "closed":
                log.warning("Redis failed %d times in a row: leaving it alone", self._num_failures)
            self.state, self._opened_at = "open", self._options.clock()


class BreakerOpenError(StoreUnavailableError):
    """Nothing was tried."""


class Decoder(Protocol[T_co]):
    """A msgspec decoder, JSON or msgpack."""

    def decode(self, buf: bytes, /) -> T_co: ...


@dataclass(slots=True)
class _Batch:
    """What goes out in one round trip, and what comes of it."""

    replies: asyncio.Future[list[Reply]]
    commands: list[Command] = field(default_factory=list)

    def fail(self, error: StoreError) -> None:
        self.replies.set_exception(error)
        self.replies.exception()  # nobody may be waiting for it any more


class Store:
    """Redis for one cluster of ingresses and replicas. `url`: redis://, rediss:// or unix://.

    Connects when first used and again after a loss; commands arrive in the order they were given in. `num_failures`,
    `num_round_trips` and `num_bad_values` only grow.
    """

    def __init__(self, url: str, cluster: str, options: StoreOptions | None = None) -> None:
        """Raises ValueError for a URL of another scheme."""
        self.options = options or StoreOptions()
        self.keys = Keys(cluster)
        self.breaker = Breaker(self.options)
        self.num_failures = 0
        self.num_round_trips = 0
        self.num_bad_values = 0
        self._noted: set[str] = set()
        self._phase = random()  # ingresses of one machine share its clock, and should not all ask at once
        self._next: _Batch | None = None
        self._sending: asyncio.Task[None] | None = None
        # One retry for a pooled connection that a restarted server has closed; none after a timeout.
        retry = Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))
        # No timeouts of redis-py's own: they are per read, so a server that answers byte by byte escapes them, and
        # its wait_for around writes can swallow a cancellation. `_attempt` bounds the whole call.
        self._redis: Any = redis.asyncio.Redis.from_url(
            url, socket_timeout=None, socket_connect_timeout=None, retry=retry, protocol=2
        )

    async def execute(self, *command: str | bytes | int | float) -> Reply:
        """Runs one command. Raises StoreUnavailableError, StoreReplyError."""
        (reply,) = await self.pipeline([command])
        if isinstance(reply, StoreReplyError):
            raise reply
        return reply

    async def pipeline(self, commands: Sequence[Command], *, alone: bool = False) -> list[Reply]:
        """Runs commands in one round trip (not a transaction); a refused one has a StoreReplyError in its place.

        `alone`: not together with what others ask, for what may take long. Raises StoreUnavailableError, at once while
        the breaker is open, else when `StoreOptions.timeout_s` has passed since it was sent.
        """
        for command in commands:
            _check(command)  # here, where it hurts nobody else
        if alone:
            with self.breaker.call():
                return await self._attempt(commands)
        batch = self._next
        if batch is None:
            batch = self._next = _Batch(asyncio.get_running_loop().create_future())
            if self._sending is None:
                self._sending = asyncio.create_task(self._send(), name="ask Redis")
        start = len(batch.commands)
        batch.commands += commands
        replies = await asyncio.shield(batch.replies)  # the others still want theirs
        return replies[start : start + len(commands)]

    async def _send(self) -> None:
        """Batch after batch, until nobody asks."""
        try:
            while (batch := self._next) is not None:
                self._next = None
                try:
                    with self.breaker.call():
                        batch.replies.set_result(await self._attempt(batch.commands))
                except StoreError as error:
                    batch.fail(error)
                except Exception as error:  # our bug; the next batch may do better
                    log.exception("asking Redis failed")
                    batch.fail(StoreUnavailableError(f"Redis was not asked: {error!r}"))
                except BaseException:
                    batch.fail(StoreUnavailableError("Redis was not asked"))
                    raise
        finally:
            self._sending = None
            left, self._next = self._next, None
            if left is not None:
                left.fail(StoreUnavailableError("Redis was not asked"))

    async def beat(self, period_s: float) -> None:
        """Sleeps until a point of time that this store's pollers of the same period, or of a part of it, share."""
        now = asyncio.get_running_loop().time() + self._phase
        left_s = period_s - now % period_s
        await asyncio.sleep(left_s if left_s > _SOON_S else left_s + period_s)

    async def close(self) -> None:
        """Waits for what is under way. Nothing may be asked afterwards."""
        if self._sending is not None:
            await asyncio.wait([self._sending])
        with contextlib.suppress(RedisError, OSError):
            await self._redis.aclose()

    def decode(self, key: str, raw: bytes, decoder: Decoder[T]) -> T:
        """Decodes a value read from `key`; raises BadValueError, logging a key once until it is good again."""
        try:
            value = decoder.decode(raw)
        except (ValueError, RecursionError) as error:  # msgspec's errors among them; RecursionError: [[[[…
            self.num_bad_values += 1
            if key not in self._noted and len(self._noted) < MAX_NOTED_VALUES:
                self._noted.add(key)
                log.warning("bad value at %s (%d bytes): %s", key, len(raw), error)
            raise BadValueError(f"bad value at {key}: {error}") from error
        self._noted.discard(key)
        return value

    async def _attempt(self, commands: Sequence[Command]) -> list[Reply]:
        self.num_round_trips += 1
        try:
            async with _patience(self.options.timeout_s):
                pipe = self._redis.pipeline(transaction=False)
                for command in commands:
                    pipe.execute_command(*command)
                replies = await pipe.execute(raise_on_error=False)
        except (RedisError, OSError, TimeoutError, EOFError, ValueError) as error:  # what speaks there may not be Redis
            self.num_failures += 1
            raise StoreUnavailableError(f"Redis: {type(error).__name__}: {error}") from error
        for reply in replies:
            if isinstance(reply, (RedisConnectionError, RedisTimeoutError)):
                self.num_failures += 1  # loading its data, or out of connections
                raise StoreUnavailableError(f"Redis: {reply}")
        return [StoreReplyError(str(reply)) if isinstance(reply, RedisError) else reply for reply in replies]


@contextlib.asynccontextmanager
async def _patience(seconds: float) -> AsyncIterator[None]:
    """`asyncio.timeout` that does not take a stall of this process for one of the other side.

    Whatever holds the event loop up once (a long callback, a collection, a starved machine) counts for a part at most:
    the sockets are read before the next part ends. A loop that is held up turn after turn gets a turn for each part.
    """
    loop = asyncio.get_running_loop()
    num_left = _PARTS
    timer: asyncio.TimerHandle | None = None

    async with asyncio.timeout(None) as limit:

        def next_part() -> None:
            nonlocal num_left, timer
            if num_left:
                num_left -= 1
                timer = loop.call_later(seconds / _PARTS, next_part)
            else:
                limit.reschedule(loop.time())

        next_part()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()


def _check(command: Command) -> None:
    """Raises TypeError, UnicodeEncodeError for what no command can hold."""
    for part in command:
        if isinstance(part, str):
            part.encode()
        elif not isinstance(part, (bytes, int, float)):
            raise TypeError(f"{part!r} cannot be part of a command")
