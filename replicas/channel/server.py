"""The replica's end of the channel: one engine, many ingresses, one frame per step and ingress."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from replicas.channel.endpoint import Endpoint, parse_endpoint
from replicas.channel.ingress import IngressConnection, Stream
from replicas.channel.journal import Journal, UsageRecord
from replicas.channel.news import OFTEN_S, SOON_S, News
from replicas.channel.transport import ChannelOptions
from replicas.contract import (
    Engine,
    EngineDeadError,
    EngineFacts,
    EngineStats,
    Fault,
    GenerateRequest,
    RefusedError,
    StepDelta,
)
from replicas.credits import EndRate, Turns, with_credit

log = logging.getLogger(__name__)


def _to_log(records: Sequence[UsageRecord]) -> None:
    for record in records:
        log.warning("usage of a lost request: %s", record)


def _ignore(adapter_id: str) -> None:
    """The default prefetch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions(ChannelOptions):
    """`journal` gets the usage of requests whose ingress vanished; `max_handshakes` bounds unauthenticated peers.

    `prefetch` hears of adapters that ingresses will want soon. `round_trip_s`: how long after the replica said that it
    can take more it expects to have it.
    """

    journal: Journal = _to_log
    prefetch: Callable[[str], None] = _ignore
    max_handshakes: int = 64
    close_s: float = 1.0
    round_trip_s: float = 0.02


class ChannelServer:
    """Serves an engine to authenticated ingresses.

    Every delta given to the engine's sink belongs to the server (it rewrites the request id). A request the engine
    refuses ends in one terminal delta with the fault. `facts` is set by `start`.
    """

    facts: EngineFacts

    def __init__(self, engine: Engine, replica_id: str, secret: bytes, options: ServerOptions | None = None) -> None:
        """Raises ValueError for an empty secret."""
        if not secret:
            raise ValueError("the cluster secret is empty")
        self.replica_id = replica_id
        self.secret = secret
        self.start_id = secrets.token_hex(8)
        self.options = options or ServerOptions()
        self.endpoints: tuple[str, ...] = ()
        self.draining = False
        self.fault: Fault | None = None
        self.num_dropped_deltas = 0
        self.num_lost_ingresses = 0
        self._engine = engine
        self._listeners: list[tuple[asyncio.Server, Endpoint]] = []
        self._pending: set[IngressConnection] = set()
        self._connections: set[IngressConnection] = set()
        self._streams: dict[str, Stream] = {}
        self._numbers = itertools.count(1)
        self._stats = EngineStats()
        self._ends = EndRate(self.options.clock)
        self._news = News(self._tell)
        self._turns: Turns[IngressConnection] = Turns()
        self._settled = asyncio.Event()
        self._closed = False

    # Life.

    async def start(self, endpoints: Sequence[str]) -> EngineFacts:
        """Starts the engine, then listens; `self.endpoints` then has real ports. Raises EngineError, EndpointError."""
        parsed = [parse_endpoint(text) for text in endpoints]
        self.facts = await self._engine.start(self._deliver)
        try:
            for endpoint in parsed:
                self._listeners.append(await endpoint.listen(lambda: IngressConnection(self)))
        except BaseException:
            await self.close()
            raise
        self.endpoints = tuple(str(endpoint) for _, endpoint in self._listeners)
        return self.facts

    async def drain(self) -> None:
        """Refuses new requests (`draining`, retryable), tells every ingress, returns when none is open."""
        self.draining = True
        self.announce()
        await self._engine.drain()
        while self.num_open:
            self._settled.clear()
            await self._settled.wait()

    def announce(self) -> None:
        """Tells every ingress the load now, rather than with the next step or heartbeat."""
        self._tell()

    def _tell(self) -> bool:
        """Tells the load to every ingress that has not heard it; whether it will change by itself."""
        stats = self.stats()
        for connection in self._connections:
            connection.tell(stats)
        return bool(self._streams)

    async def close(self) -> None:
        """Ends open requests with `engine_dead`, sends what is written, stops listening. Idempotent."""
        if self._closed:
            return
        self._closed = self.draining = True
        self._news.close()
        for listener, _ in self._listeners:
            listener.close()
        try:
            await self._engine.close()
        finally:
            self.fail_open(Fault("engine_dead", f"replica {self.replica_id} is shutting down", retryable=True))
            await self._hang_up()
            for _, endpoint in self._listeners:
                endpoint.clean()

    def fail_open(self, fault: Fault) -> None:
        """Ends every open request with `fault`, and refuses later ones with it: the engine is of no more use."""
        self.fault = fault
        streams = list(self._streams.values())
        self._deliver([StepDelta(stream.engine_id, finish_reason="error", fault=fault) for stream in streams])

    async def _hang_up(self) -> None:
        """Lets the sockets drain for a moment, then drops them."""
        connections = [*self._connections, *self._pending]
        for connection in connections:
            connection.streams.clear()  # each has had its terminal delta, or never will: no usage to journal
            connection.finish("the replica closed")
        try:
            async with asyncio.timeout(self.options.close_s):
                for connection in connections:
                    await connection.closed.wait()
        except TimeoutError:
            for connection in connections:
                connection.transport.abort()

    @property
    def num_open(self) -> int:
        """Requests whose terminal delta has not been handed to their ingress's socket."""
        return sum(len(connection.streams) for connection in self._connections)

    @property
    def num_ingresses(self) -> int:
        return len(self._connections)

    def stats(self) -> EngineStats:
        """The engine's load and what it wants beyond it, or the last known one when it is dead."""
        try:
            round_trip_s = self.options.round_trip_s
            per_round_trip = (round_trip_s, round_trip_s * self._ends.per_s)
            self._stats = with_credit(self._engine.stats(), self.facts, per_round_trip)
        except EngineDeadError as error:
            self.fault = self.fault or Fault("engine_dead", str(error), retryable=True)
        if self.draining and not self._stats.draining:
            return msgspec.structs.replace(self._stats, draining=True)
        return self._stats

    # Engine → ingresses.

    def _deliver(self, deltas: Sequence[StepDelta]) -> None:
        """The engine's sink: one frame per ingress for all deltas of the step."""
        touched: set[IngressConnection] = set()
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None:
                self.num_dropped_deltas += 1  # aborted meanwhile, or of an older attempt
                continue
            self._account(stream, delta)
            delta.request_id = stream.request.request_id
            delta.attempt = stream.request.attempt
            if stream.connection.put(stream, delta):
                touched.add(stream.connection)
        if touched:
            stats = self.stats()
            for connection in touched:
                connection.flush(stats)

    def _account(self, stream: Stream, delta: StepDelta) -> None:
        stream.num_output += len(delta.token_ids)
        if delta.num_cached_tokens is not None:
            stream.num_cached = delta.num_cached_tokens
        if delta.finish_reason is not None:
            stream.ended = True
            self._ends.ended()
            del self._streams[stream.engine_id]
            if delta.fault is not None and delta.fault.code == "engine_dead":
                self.fault = self.fault or delta.fault

    # Ingresses → engine (see `ingress.Host`).

    def turn(self, connection: IngressConnection) -> int:
        return self._turns.of(connection, self.options.clock())

    def admit(self, connection: IngressConnection) -> bool:
        if self._closed or len(self._pending) >= self.options.max_handshakes:
            return False
        self._pending.add(connection)
        return True

    def welcomed(self, connection: IngressConnection) -> None:
        self._pending.discard(connection)
        self._connections.add(connection)
        self._turns.join(connection)
        log.info("ingress %s connected", connection.ingress_id)

    def open(self, connection: IngressConnection, request: GenerateRequest) -> None:
        engine_id = f"{next(self._numbers)}/{request.request_id}/{request.attempt}"
        stream = Stream(request, engine_id, connection)
        connection.streams[request.request_id] = stream
        self._streams[engine_id] = stream
        fault = self._submit(engine_id, request)
        if fault is not None:
            self._deliver([StepDelta(engine_id, finish_reason="error", fault=fault)])
        self._turns.sent(connection, self.options.clock())
        self._news.within(SOON_S if len(self._connections) > 1 else OFTEN_S)

    def _submit(self, engine_id: str, request: GenerateRequest) -> Fault | None:
        """Hands the request to the engine; returns why it will not run."""
        if self.fault is not None:
            return self.fault
        if self.draining:
            return Fault("draining", f"replica {self.replica_id} is draining", retryable=True)
        try:
            self._engine.submit(msgspec.structs.replace(request, request_id=engine_id))
        except RefusedError as error:
            return error.fault
        except EngineDeadError as error:
            self.fault = Fault("engine_dead", str(error), retryable=True)
            return self.fault
        except Exception as error:  # our bug; it must not take the other streams of this connection down
            log.exception("submit of %s failed", request.request_id)
            return Fault("internal", f"{type(error).__name__} in the engine's submit")
        return None

    def abort(self, stream: Stream) -> None:
        if self._streams.pop(stream.engine_id, None) is not None:
            self._engine.abort(stream.engine_id)

    def prefetch(self, adapter_id: str) -> None:
        if not self.draining:
            self.options.prefetch(adapter_id)

    def settled(self) -> None:
        self._settled.set()

    def lost(self, connection: IngressConnection, reason: str) -> None:
        self._pending.discard(connection)
        self._turns.leave(connection)
        if connection not in self._connections:
            log.warning("a connection ended before it had authenticated: %s", reason)
            return
        self._connections.discard(connection)
        streams, connection.streams = list(connection.streams.values()), {}
        for stream in streams:
            self.abort(stream)
        self.settled()
        log.info("ingress %s is gone with %d open requests: %s", connection.ingress_id, len(streams), reason)
        if streams:
            self.num_lost_ingresses += 1
            self._close_records(streams, reason)

    def _close_records(self, streams: Sequence[Stream], reason: str) -> None:
        records = [_usage(stream, self.replica_id, reason) for stream in streams]
        try:
            self.options.journal(records)
        except OSError:
            log.exception("the journal refused %d records: %s", len(records), records)


def _usage(stream: Stream, replica_id: str, reason: str) -> UsageRecord:
    request = stream.request
    return UsageRecord(
        request_id=request.request_id,
        attempt=request.attempt,
        tenant=request.tenant,
        replica_id=replica_id,
        ingress_id=stream.connection.ingress_id,
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=stream.num_cached,
        num_output_tokens=stream.num_output,
        num_prior_tokens=len(request.produced) // 4,
        reason=reason,
        adapter=request.adapter,
    )
