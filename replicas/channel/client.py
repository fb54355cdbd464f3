"""The ingress's end of the channel: one link per replica, many streams over it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from replicas.channel.connection import LinkConnection
from replicas.channel.endpoint import parse_endpoint
from replicas.channel.errors import EndpointError, FrameTooLargeError, HandshakeTimeoutError, LinkLostError
from replicas.channel.frames import (
    MAX_FRAME_BYTES,
    Abort,
    Frame,
    Open,
    Pause,
    Ping,
    ReplicaFrame,
    Resume,
    Step,
    Welcome,
    encode,
)
from replicas.channel.transport import ChannelOptions
from replicas.contract import EngineFacts, EngineStats, GenerateRequest, StepDelta

log = logging.getLogger(__name__)

CLOSE_S = 1.0
"""How long `close` lets unsent frames go out."""


def _ignore(link: ReplicaLink) -> None:
    """The default callback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions(ChannelOptions):
    """`on_stats(link)` once for each read that changed `link.stats`; `on_lost(link)` once, when the link dies by itself
    (not by `close`), before its streams hear of it.

    A reader with more than `high_water` deltas unread makes its stream pause at the replica, which goes on once it
    has `low_water` or fewer.
    """

    on_stats: Callable[[ReplicaLink], None] = _ignore
    on_lost: Callable[[ReplicaLink], None] = _ignore
    high_water: int = 64
    low_water: int = 16


class DeltaStream(AsyncIterator[StepDelta]):
    """One attempt's deltas, the terminal one last; for one reader, who awaits each, or takes those that are `ready`
    when `listen`'s callback says so.

    Raises LinkLostError after the deltas that had arrived. `cancel` ends it without a terminal delta.
    """

    __slots__ = ("_callback", "_deltas", "_error", "_link", "_over", "_paused", "_waiter", "attempt", "request_id")

    def __init__(self, link: ReplicaLink, request: GenerateRequest) -> None:
        self.request_id = request.request_id
        self.attempt = request.attempt
        self._link = link
        self._deltas: deque[StepDelta] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._callback: Callable[[], None] | None = None
        self._error: LinkLostError | None = None
        self._paused = False
        self._over = False

    def cancel(self) -> None:
        """Tells the replica to stop and drops what was not read. No-op when it has ended."""
        self._deltas.clear()
        if not self._over:
            self._link.abandon(self)

    async def __anext__(self) -> StepDelta:
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if self._over:
                raise StopAsyncIteration
            assert self._waiter is None, f"two readers of stream {self.request_id}"
            self._waiter = self._link.new_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        delta = self._deltas.popleft()
        self._taken()
        return delta

    def ready(self) -> list[StepDelta]:
        """All that have arrived and were not read; [] when there are none, and after the end."""
        if not self._deltas:
            if self._error is not None:
                raise self._error
            return []
        deltas = list(self._deltas)
        self._deltas.clear()
        self._taken()
        return deltas

    @property
    def over(self) -> bool:
        """Nothing more will arrive; what has arrived may still be unread."""
        return self._over

    def listen(self, callback: Callable[[], None] | None) -> None:
        """Calls back once for each read from the socket that brought something (or the end)."""
        self._callback = callback

    def _taken(self) -> None:
        if self._paused and len(self._deltas) <= self._link.options.low_water:
            self._paused = False
            self._link.send(Resume(self.request_id, self.attempt))

    def _push(self, delta: StepDelta) -> None:
        """Keeps a delta until it is read; `_wake` tells."""
        self._deltas.append(delta)
        if delta.finish_reason is not None:
            self._over, self._paused = True, False
        elif len(self._deltas) > self._link.options.high_water and not self._paused:
            self._paused = True
            self._link.send(Pause(self.request_id, self.attempt))

    def _end(self, error: LinkLostError | None = None) -> None:
        self._over = True
        self._paused = False
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._callback is not None:
            try:
                self._callback()
            except Exception:  # our bug, but the link's other streams must hear their news
                log.exception("the listener of %s failed", self.request_id)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class ReplicaLink:
    """An authenticated connection to one replica, shared by all of an ingress's requests to it.

    `start_id`: which start of the replica it leads to. `stats` is its load as last pushed, `stats_at` when it came
    (seconds of `options.clock`). Of the
    `num_opened` requests sent the first `num_counted` are in it; None for a replica that does not say. `turn`: how many
    other ingresses may use first what it wants.
    """

    def __init__(self, connection: LinkConnection, welcome: Welcome, options: LinkOptions) -> None:
        """For `connect` only."""
        self.replica_id = welcome.replica_id
        self.facts: EngineFacts = welcome.facts
        self.start_id = welcome.start_id
        self.stats: EngineStats = welcome.stats
        self.stats_at = options.clock()
        self.options = options
        self.num_stale_deltas = 0
        self.num_opened = 0
        self.num_counted: int | None = None
        self.turn = 0
        # Asking for the running loop costs a system call (CPython 3.11 checks its pid): not once a token.
        self.new_future: Callable[[], asyncio.Future[None]] = asyncio.get_running_loop().create_future
        self._connection = connection
        self._streams: dict[str, DeltaStream] = {}
        self._touched: dict[DeltaStream, None] = {}  # have news since the last turn of the socket
        self._closed = False

    @classmethod
    async def connect(
        cls, endpoint: str, secret: bytes, ingress_id: str, options: LinkOptions | None = None
    ) -> ReplicaLink:
        """Connects and authenticates both ways within `options.handshake_s`.

        `ingress_id` names this process in the replica's log and journal. Raises EndpointError (malformed, or nobody
        listens), AuthenticationFailedError, VersionMismatchError, HandshakeTimeoutError, HandshakeError; all of them
        are ChannelError. ValueError for an empty secret.
        """
        if not secret:
            raise ValueError("the cluster secret is empty")
        options = options or LinkOptions()
        connection = LinkConnection(secret, ingress_id, options)
        welcome: Welcome | None = None
        try:
            async with asyncio.timeout(options.handshake_s):
                await parse_endpoint(endpoint).connect(lambda: connection)
                welcome = await connection.welcome
        except TimeoutError:
            raise HandshakeTimeoutError(f"{endpoint} did not answer within {options.handshake_s} s") from None
        except OSError as error:
            raise EndpointError(f"cannot reach {endpoint}: {error.strerror or error}") from error
        finally:
            if welcome is None:  # also when cancelled in the very turn in which it came
                connection.give_up()
        if connection.lost_reason is not None:
            raise LinkLostError(welcome.replica_id, connection.lost_reason)
        link = cls(connection, welcome, options)
        connection.attach(link)
        return link

    @property
    def alive(self) -> bool:
        return self._connection.lost_reason is None

    @property
    def num_open(self) -> int:
        return len(self._streams)

    def open(self, request: GenerateRequest) -> DeltaStream:
        """Sends a request; its deltas come out of the stream.

        Raises LinkLostError when the link is down, FrameTooLargeError, and ValueError when this request is open with
        this attempt or a later one; an open older attempt is cancelled.
        """
        if not self.alive:
            raise LinkLostError(self.replica_id, self._connection.lost_reason or "closed")
        older = self._streams.get(request.request_id)
        if older is not None and older.attempt >= request.attempt:
            raise ValueError(f"request {request.request_id} is open: attempt {older.attempt}, not {request.attempt}")
        frame = encode(Open(request))
        allowed = min(MAX_FRAME_BYTES, self.options.max_frame_bytes)
        if len(frame) > allowed:
            raise FrameTooLargeError(f"request {request.request_id} takes {len(frame)} bytes, allowed {allowed}")
        if older is not None:
            older.cancel()
        stream = self._streams[request.request_id] = DeltaStream(self, request)
        self._connection.send_encoded(frame)
        self.num_opened += 1
        return stream

    def prefetch(self, adapter_id: str) -> None:
        """Tells the replica that a request for the adapter will come. Nothing happens once the link is down."""
        self.send(Ping((adapter_id,)))

    async def close(self) -> None:
        """Aborts what is open (its readers get LinkLostError) and closes the connection. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for stream in list(self._streams.values()):
            self.send(Abort(stream.request_id, stream.attempt))
        self._connection.finish("closed by this side")
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._connection.closed.wait()
        except TimeoutError:
            self._connection.transport.abort()

    def send(self, frame: Frame) -> None:
        """For streams: nothing happens once the link is down."""
        self._connection.send(frame)

    def abandon(self, stream: DeltaStream) -> None:
        """For streams: aborts at the replica and forgets."""
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
            self.send(Abort(stream.request_id, stream.attempt))
        stream._end()

    # What the connection says (see `connection.LinkEvents`).

    def received(self, frame: ReplicaFrame) -> None:
        self.stats = frame.stats
        self.num_counted, self.turn = frame.num_opened, frame.turn
        self.stats_at = self.options.clock()
        if isinstance(frame, Step):
            for delta in frame.deltas:
                stream = self._streams.get(delta.request_id)
                if stream is None or stream.attempt != delta.attempt:
                    self.num_stale_deltas += 1
                    continue
                if delta.finish_reason is not None:
                    del self._streams[delta.request_id]
                stream._push(delta)
                self._touched[stream] = None

    def read_done(self) -> None:
        self._tell()
        self.options.on_stats(self)

    def lost(self, reason: str) -> None:
        if not self._closed:
            self.options.on_lost(self)
        self._tell()  # a stream that ended in this very read is in none of those below
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream._end(LinkLostError(self.replica_id, reason))

    def _tell(self) -> None:
        touched, self._touched = self._touched, {}
        for stream in touched:
            stream._wake()
