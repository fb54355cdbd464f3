"""The connection to Redis (or Valkey): short timeouts, a circuit breaker, keys. The only importer of redis.

Nothing on the request path may await this module: what requests need is kept in memory, by tasks that read here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    """`timeout_s` bounds a whole call. The breaker opens after `max_failures` in a row, and tries again with one
    call every `open_s`."""

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


class Store:
    """Redis for one cluster of ingresses and replicas. `url`: redis://, rediss:// or unix://.

    Connects when first used and again after a loss. `num_failures` and `num_bad_values` only grow.
    """

    def __init__(self, url: str, cluster: str, options: StoreOptions | None = None) -> None:
        """Raises ValueError for a URL of another scheme."""
        self.options = options or StoreOptions()
        self.keys = Keys(cluster)
        self.breaker = Breaker(self.options)
        self.num_failures = 0
        self.num_bad_values = 0
        self._noted: set[str] = set()
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

    async def pipeline(self, commands: Sequence[Command]) -> list[Reply]:
        """Runs commands in one round trip (not a transaction); a refused one has a StoreReplyError in its place.

        Raises StoreUnavailableError within `timeout_s`, at once while the breaker is open.
        """
        with self.breaker.call():
            return await self._attempt(commands)

    async def close(self) -> None:
        with contextlib.suppress(RedisError, OSError):
            await self._redis.aclose()

    def decode(self, key: str, raw: bytes, decoder: Decoder[T]) -> T:
        """Decodes a value read from `key`; raises BadValueError, logging a key once until it is good again."""
        try:
            value = decoder.decode(raw)
        except ValueError as error:  # msgspec's errors among them
            self.num_bad_values += 1
            if key not in self._noted and len(self._noted) < MAX_NOTED_VALUES:
                self._noted.add(key)
                log.warning("bad value at %s (%d bytes): %s", key, len(raw), error)
            raise BadValueError(f"bad value at {key}: {error}") from error
        self._noted.discard(key)
        return value

    async def _attempt(self, commands: Sequence[Command]) -> list[Reply]:
        try:
            async with asyncio.timeout(self.options.timeout_s):
                pipe = self._redis.pipeline(transaction=False)
                for command in commands:
                    pipe.execute_command(*command)
                replies = await pipe.execute(raise_on_error=False)
        except (RedisError, OSError, TimeoutError, EOFError) as error:
            self.num_failures += 1
            raise StoreUnavailableError(f"Redis: {type(error).__name__}: {error}") from error
        for reply in replies:
            if isinstance(reply, (RedisConnectionError, RedisTimeoutError)):
                self.num_failures += 1  # loading its data, or out of connections
                raise StoreUnavailableError(f"Redis: {reply}")
        return [StoreReplyError(str(reply)) if isinstance(reply, RedisError) else reply for reply in replies]
