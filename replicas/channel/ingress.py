"""The replica's side of one connection: an ingress, its open streams, and what waits for it to read."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from replicas.channel.auth import Transcript, fresh_nonce
from replicas.channel.backlog import Backlog
from replicas.channel.frames import (
    MAGIC,
    MAX_FRAME_BYTES,
    VERSION,
    Abort,
    Beat,
    Challenge,
    Frame,
    Hello,
    Open,
    Pause,
    Ping,
    Refusal,
    RefusalCode,
    Resume,
    Step,
    Welcome,
    decode_hello,
    decode_ingress,
    encode,
)
from replicas.channel.transport import ChannelOptions, FrameProtocol
from replicas.contract import EngineFacts, EngineStats, GenerateRequest, StepDelta


@dataclass(slots=True, eq=False)
class Stream:
    """One attempt of one request. `engine_id` is its name inside the engine, unique over connections and attempts."""

    request: GenerateRequest
    engine_id: str
    connection: IngressConnection
    num_cached: int = 0
    num_output: int = 0
    paused: bool = False
    ended: bool = False
    backlog: Backlog = field(default_factory=Backlog)


class Host(Protocol):
    """What a connection needs from the server it belongs to."""

    @property
    def replica_id(self) -> str: ...

    @property
    def secret(self) -> bytes: ...

    @property
    def options(self) -> ChannelOptions: ...

    @property
    def facts(self) -> EngineFacts: ...

    @property
    def start_id(self) -> str: ...

    def stats(self) -> EngineStats: ...

    def turn(self, connection: IngressConnection) -> int:
        """How many other ingresses may use first what the replica wants."""
        ...

    def admit(self, connection: IngressConnection) -> bool:
        """Counts a connection that has not proved itself yet; False when there are too many."""
        ...

    def welcomed(self, connection: IngressConnection) -> None: ...

    def open(self, connection: IngressConnection, request: GenerateRequest) -> None: ...

    def abort(self, stream: Stream) -> None: ...

    def prefetch(self, adapter_id: str) -> None:
        """A request for this adapter will come soon."""
        ...

    def settled(self) -> None:
        """A stream has left `connection.streams`."""
        ...

    def lost(self, connection: IngressConnection, reason: str) -> None: ...


class IngressConnection(FrameProtocol):
    """Speaks with one ingress. `streams` are those whose terminal delta has not been sent yet, by request id."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.options)
        self.ingress_id = ""
        self.streams: dict[str, Stream] = {}
        self.outbox: list[StepDelta] = []
        self.num_stale_frames = 0
        self.num_opened = 0
        self._told: EngineStats | None = None
        self._host = host
        self._nonce = fresh_nonce()
        self._deadline: asyncio.TimerHandle | None = None

    # The handshake.

    def on_connected(self) -> None:
        if not self._host.admit(self):
            self._refuse("busy", "too many connections are waiting to authenticate")
            return
        self._deadline = asyncio.get_running_loop().call_later(
            self.options.handshake_s, self.fail, f"no handshake within {self.options.handshake_s} s"
        )
        self.send(Challenge(MAGIC, VERSION, self._nonce))

    def _on_hello(self, hello: Hello) -> None:
        if hello.version != VERSION:
            self._refuse(
                "version_mismatch", f"the replica speaks channel version {VERSION}, the ingress {hello.version}"
            )
            return
        host = self._host
        theirs = Transcript("ingress", self._nonce, hello.nonce, hello.ingress_id)
        if not theirs.is_proved_by(hello.proof, host.secret):
            self._refuse("authentication_failed", "the ingress does not know this replica's cluster secret")
            return
        self.ingress_id = hello.ingress_id
        self.max_frame_bytes = min(self.options.max_frame_bytes, MAX_FRAME_BYTES)
        ours = Transcript("replica", self._nonce, hello.nonce, host.replica_id)
        self.send(Welcome(host.replica_id, ours.proof(host.secret), host.facts, host.stats(), host.start_id))
        self._cancel_deadline()
        self.start_heartbeats()
        host.welcomed(self)

    def _refuse(self, code: RefusalCode, message: str) -> None:
        self.send(Refusal(code, message))
        self.finish(f"{code}: {message}")

    # Frames.

    def on_frame(self, payload: memoryview) -> None:
        if not self.ingress_id:
            self._on_hello(decode_hello(payload))
            return
        match decode_ingress(payload):
            case Open(request):
                self._on_open(request)
            case Abort(request_id, attempt):
                self._on_abort(request_id, attempt)
            case Pause(request_id, attempt):
                if (stream := self._stream(request_id, attempt)) is not None:
                    stream.paused = True
            case Resume(request_id, attempt):
                self._on_resume(request_id, attempt)
            case Ping(adapters):
                for adapter_id in adapters:
                    self._host.prefetch(adapter_id)

    def _on_open(self, request: GenerateRequest) -> None:
        self.num_opened += 1
        older = self.streams.get(request.request_id)
        if older is not None:
            if older.request.attempt >= request.attempt:
                self.num_stale_frames += 1
                return
            self._host.abort(older)
        self._host.open(self, request)

    def _on_abort(self, request_id: str, attempt: int) -> None:
        stream = self._stream(request_id, attempt)
        if stream is not None:
            self._forget(stream)
            self._host.abort(stream)

    def _on_resume(self, request_id: str, attempt: int) -> None:
        stream = self._stream(request_id, attempt)
        if stream is not None:
            stream.paused = False
            self._send_backlogs([stream])

    def _stream(self, request_id: str, attempt: int) -> Stream | None:
        stream = self.streams.get(request_id)
        if stream is not None and stream.request.attempt == attempt:
            return stream
        self.num_stale_frames += 1  # or one that crossed the terminal delta on the wire
        return None

    def _forget(self, stream: Stream) -> None:
        del self.streams[stream.request.request_id]
        self._host.settled()

    # What goes out.

    def put(self, stream: Stream, delta: StepDelta) -> bool:
        """Takes one delta of a step; True when `flush` has something to send for this connection."""
        if stream.paused or not self.writable:
            stream.backlog.add(delta)
        else:
            self.outbox.append(delta)
            if stream.ended:
                self._forget(stream)
        return bool(self.outbox)

    def flush(self, stats: EngineStats) -> None:
        """Sends all that was put since the last time as one frame (more only beyond the frame bound)."""
        deltas, self.outbox = self.outbox, []
        if deltas:
            self._send_step(stats, deltas)

    def on_writable(self) -> None:
        self._send_backlogs(list(self.streams.values()))

    def _send_backlogs(self, streams: list[Stream]) -> None:
        if not self.writable:
            return
        deltas = []
        for stream in streams:
            if stream.backlog and not stream.paused:
                deltas.append(stream.backlog.take())
                if stream.ended:
                    self._forget(stream)
        if deltas:
            self._send_step(self._host.stats(), deltas)

    def _send_step(self, stats: EngineStats, deltas: list[StepDelta]) -> None:
        self._told = stats
        frame = encode(Step(stats, deltas, self.num_opened, self._host.turn(self)))
        if len(frame) > MAX_FRAME_BYTES and len(deltas) > 1:
            middle = len(deltas) // 2
            self._send_step(stats, deltas[:middle])
            self._send_step(stats, deltas[middle:])
        else:
            self.send_encoded(frame)

    def tell(self, stats: EngineStats) -> None:
        """Tells the ingress the load, unless it has heard just that, or does not read."""
        if self.writable and stats != self._told:
            self.send(self._beat_of(stats))

    def heartbeat(self) -> Frame:
        return self._beat_of(self._host.stats())

    def _beat_of(self, stats: EngineStats) -> Beat:
        self._told = stats
        return Beat(stats, self.num_opened, self._host.turn(self))

    def on_lost(self, reason: str) -> None:
        self._cancel_deadline()
        self._host.lost(self, reason)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
