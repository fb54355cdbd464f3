"""The channel against strangers, impostors, garbage and death: real sockets, hand-made bytes, real killed processes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from replicas.channel import (
    AuthenticationFailedError,
    ChannelServer,
    EndpointError,
    HandshakeError,
    HandshakeTimeoutError,
    JsonLinesJournal,
    LinkLostError,
    LinkOptions,
    ProtocolError,
    ReplicaLink,
    ServerOptions,
    UsageRecord,
    VersionMismatchError,
)
from replicas.channel import connection as connection_module
from replicas.channel.auth import Transcript, fresh_nonce
from replicas.channel.frames import (
    HEADER,
    MAGIC,
    MAX_HANDSHAKE_BYTES,
    VERSION,
    Challenge,
    Hello,
    Open,
    Refusal,
    Welcome,
    decode_greeting,
    encode,
)
from replicas.contract import EngineStats, StepDelta
from tests.replicas.scripted import FACTS, SECRET, ScriptedEngine, counting, request, until


class Replica:
    """A served scripted engine that keeps its journal in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.engine = ScriptedEngine()
        self.records: list[UsageRecord] = []
        options = ServerOptions(
            heartbeat_s=0.1, dead_after_s=0.4, handshake_s=0.3, max_handshakes=4, journal=self.records.extend
        )
        self.server = ChannelServer(self.engine, "replica-1", SECRET, options)

    @property
    def endpoint(self) -> str:
        return f"unix://{self.path}"

    async def raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection without any manners, as a stranger would make it."""
        return await asyncio.open_unix_connection(self.path)

    async def still_serves(self) -> None:
        link = await ReplicaLink.connect(self.endpoint, SECRET, "honest")
        stream = link.open(request("honest"))
        await until(lambda: any("honest" in i for i in self.engine.open))
        self.engine.step(counting(1))
        assert [d.finish_reason async for d in stream] == ["length"]
        await link.close()


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[Replica]:
    replica = Replica(tmp_path / "r.sock")
    await replica.server.start([replica.endpoint])
    yield replica
    await replica.server.close()
    await asyncio.sleep(0.01)  # links that a test left behind hear of the end


async def greeting(reader: asyncio.StreamReader) -> Challenge | Welcome | Refusal:
    (num_bytes,) = HEADER.unpack(await reader.readexactly(HEADER.size))
    return decode_greeting(await reader.readexactly(num_bytes))


async def is_dropped(reader: asyncio.StreamReader, within_s: float = 2.0) -> bool:
    """Whether the other side ends the connection (what it still says is skipped)."""
    async with asyncio.timeout(within_s):
        try:
            while await reader.read(65536):
                pass
        except ConnectionError:
            pass
    return True


# Handshake.


async def test_a_wrong_secret_is_refused_and_said_so(replica: Replica) -> None:
    with pytest.raises(AuthenticationFailedError, match="does not know this replica's cluster secret"):
        await ReplicaLink.connect(replica.endpoint, b"another secret", "intruder")
    assert replica.server.num_ingresses == 0
    await replica.still_serves()


async def test_an_empty_secret_is_refused_on_both_sides(replica: Replica) -> None:
    with pytest.raises(ValueError, match="empty"):
        ChannelServer(ScriptedEngine(), "r", b"")
    with pytest.raises(ValueError, match="empty"):
        await ReplicaLink.connect(replica.endpoint, b"", "ingress")


async def test_a_replica_that_does_not_know_the_secret_gets_no_request(tmp_path: Path) -> None:
    path = str(tmp_path / "impostor.sock")
    leftovers: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode(Challenge(MAGIC, VERSION, fresh_nonce())))
        hello = await reader.readexactly(HEADER.size)
        stolen = msgspec.msgpack.decode(await reader.readexactly(HEADER.unpack(hello)[0]), type=Hello)
        # The best it can do is to send the ingress's own proof back.
        writer.write(encode(Welcome("replica-1", stolen.proof, FACTS, EngineStats())))
        leftovers.set_result(await reader.read())
        writer.close()

    server = await asyncio.start_unix_server(impostor, path)
    try:
        with pytest.raises(AuthenticationFailedError, match="does not know this ingress's cluster secret"):
            await ReplicaLink.connect(f"unix://{path}", SECRET, "ingress")
        assert await leftovers == b"", "not a byte more from the ingress"
        await asyncio.sleep(0)
    finally:
        server.close()


async def test_a_recorded_proof_does_not_work_a_second_time(replica: Replica) -> None:
    reader, writer = await replica.raw()
    first = await greeting(reader)
    assert isinstance(first, Challenge)
    nonce = fresh_nonce()
    proof = Transcript("ingress", first.nonce, nonce, "me").proof(SECRET)
    writer.write(encode(Hello(VERSION, "me", nonce, proof)))
    assert isinstance(await greeting(reader), Welcome)
    writer.close()
    reader, writer = await replica.raw()
    await greeting(reader)
    writer.write(encode(Hello(VERSION, "me", nonce, proof)))
    refusal = await greeting(reader)
    assert isinstance(refusal, Refusal)
    assert refusal.code == "authentication_failed"
    assert await is_dropped(reader)
    writer.close()


async def test_a_version_mismatch_names_both_versions(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = await replica.raw()
    await greeting(reader)
    writer.write(encode(Hello(VERSION + 1, "newer", fresh_nonce(), b"")))
    refusal = await greeting(reader)
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.message) == (
        "version_mismatch",
        f"the replica speaks channel version {VERSION}, the ingress {VERSION + 1}",
    )
    assert await is_dropped(reader)
    writer.close()
    monkeypatch.setattr(connection_module, "VERSION", VERSION + 1)
    with pytest.raises(VersionMismatchError, match=f"speaks channel version {VERSION}, this ingress {VERSION + 1}"):
        await ReplicaLink.connect(replica.endpoint, SECRET, "newer")


async def test_requests_before_the_handshake_never_reach_the_engine(replica: Replica) -> None:
    reader, writer = await replica.raw()
    writer.write(encode(Open(request("stowaway"))))
    assert await is_dropped(reader)
    assert replica.engine.submitted == []
    writer.close()


@pytest.mark.parametrize("claim", [MAX_HANDSHAKE_BYTES + 1, 2**32 - 1])
async def test_an_oversized_frame_before_authentication_ends_at_its_header(replica: Replica, claim: int) -> None:
    reader, writer = await replica.raw()
    writer.write(HEADER.pack(claim))  # and not one byte of it
    assert await is_dropped(reader, 0.25), "dropped for the claim, not by the handshake's timeout"
    await replica.still_serves()
    writer.close()


async def test_garbage_costs_its_own_connection_only(replica: Replica) -> None:
    noise = random.Random(7)
    for num_bytes in (1, 4, 5, 100, 5000):
        for _ in range(4):
            reader, writer = await replica.raw()
            writer.write(noise.randbytes(num_bytes))
            writer.write(encode(Hello(VERSION, "x", fresh_nonce(), b"proof"))[: num_bytes % 40])
            assert await is_dropped(reader)
            writer.close()
    await replica.still_serves()


@pytest.mark.parametrize(
    "payload", [b"", b"\xc1", b"\x92\x10\xc0", b"\x91\x63", b"\x92\x10\x81\xa1\xff\x01", b"\xdd\xff\xff\xff\xff"]
)
async def test_garbage_after_authentication_costs_its_own_link_only(replica: Replica, payload: bytes) -> None:
    good = await ReplicaLink.connect(replica.endpoint, SECRET, "good")
    stream = good.open(request("good"))
    bad = await ReplicaLink.connect(replica.endpoint, SECRET, "bad")
    bad._connection.transport.write(HEADER.pack(len(payload)) + payload)
    await until(lambda: not bad.alive)
    replica.engine.step(counting(1))
    assert [d.finish_reason async for d in stream] == ["length"]
    await good.close()


async def test_garbage_from_the_replica_loses_the_link_with_a_reason(replica: Replica) -> None:
    link = await ReplicaLink.connect(replica.endpoint, SECRET, "ingress")
    stream = link.open(request("r"))
    await until(lambda: replica.engine.open)
    (connection,) = replica.server._connections
    connection.transport.write(HEADER.pack(3) + b"\xc1\xc1\xc1")
    with pytest.raises(LinkLostError, match="protocol error"):
        await anext(stream)
    await until(lambda: not replica.engine.open)


async def test_half_frames_are_put_together_whatever_the_cuts(replica: Replica) -> None:
    link = await ReplicaLink.connect(replica.endpoint, SECRET, "ingress", LinkOptions(heartbeat_s=60, dead_after_s=60))
    wire = b"".join(encode(Open(request(f"r{i}"))) for i in range(5))
    cuts = sorted(random.Random(3).sample(range(1, len(wire)), 60))
    for start, stop in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        link._connection.transport.write(wire[start:stop])
        await asyncio.sleep(0.001)
    await until(lambda: len(replica.engine.submitted) == 5)
    assert [r.prompt for r in replica.engine.submitted] == [request("r").prompt] * 5
    await link.close()


async def test_a_slow_handshake_is_cut_off_whatever_it_drips(replica: Replica) -> None:
    reader, writer = await replica.raw()
    began = time.monotonic()

    async def drip() -> None:
        for byte in encode(Hello(VERSION, "slow", fresh_nonce(), b"")):
            writer.write(bytes([byte]))
            await asyncio.sleep(0.05)

    dripping = asyncio.create_task(drip())
    assert await is_dropped(reader)
    assert 0.2 < time.monotonic() - began < 1.0
    dripping.cancel()
    writer.close()


async def test_strangers_cannot_take_more_than_their_share_of_handshakes(replica: Replica) -> None:
    strangers = [await replica.raw() for _ in range(4)]
    await until(lambda: len(replica.server._pending) == 4)
    with pytest.raises(HandshakeError, match="too many connections"):
        await ReplicaLink.connect(replica.endpoint, SECRET, "fifth")
    for _, writer in strangers:
        writer.close()
    await until(lambda: not replica.server._pending)
    await replica.still_serves()


async def test_a_server_that_never_speaks_times_the_handshake_out(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(tmp_path / "mute.sock"))
        mute.listen()
        with pytest.raises(HandshakeTimeoutError, match=r"did not answer within 0.2 s"):
            await ReplicaLink.connect(f"unix://{tmp_path}/mute.sock", SECRET, "i", LinkOptions(handshake_s=0.2))


async def test_a_peer_of_another_protocol_is_a_protocol_error(tmp_path: Path) -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_unix_server(http, str(tmp_path / "http.sock"))
    with pytest.raises(ProtocolError):
        await ReplicaLink.connect(f"unix://{tmp_path}/http.sock", SECRET, "i")
    server.close()


# Silence and death.


async def test_a_replica_that_falls_silent_loses_the_link_within_its_time(tmp_path: Path) -> None:
    async with asyncio.timeout(10):
        process = await run_replica(tmp_path)
        try:
            lost: list[ReplicaLink] = []
            options = LinkOptions(heartbeat_s=0.1, dead_after_s=0.5, on_lost=lost.append)
            link = await ReplicaLink.connect(f"unix://{tmp_path}/child.sock", SECRET, "ingress", options)
            stream = link.open(request("r"))
            await asyncio.sleep(0.7)
            assert link.alive, "an idle replica lives by its heartbeats"
            os.kill(process.pid, signal.SIGSTOP)
            began = time.monotonic()
            with pytest.raises(LinkLostError, match="no sign of life") as caught:
                await anext(stream)
            assert 0.3 < time.monotonic() - began < 1.0
            assert caught.value.replica_id == "child"
            assert lost == [link]
            with pytest.raises(LinkLostError):
                link.open(request("next"))
        finally:
            process.kill()
            process.wait()


async def test_a_killed_replica_loses_every_stream_at_once(tmp_path: Path) -> None:
    async with asyncio.timeout(10):
        process = await run_replica(tmp_path)
        link = await ReplicaLink.connect(f"unix://{tmp_path}/child.sock", SECRET, "ingress")
        streams = [link.open(request(f"r{i}")) for i in range(20)]
        readers = [asyncio.create_task(anext(stream)) for stream in streams]  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        process.kill()
        began = time.monotonic()
        outcomes = await asyncio.gather(*readers, return_exceptions=True)
        assert time.monotonic() - began < 0.5, "the end of the file says it, no timeout is needed"
        assert all(isinstance(o, LinkLostError) for o in outcomes)
        process.wait()
        with pytest.raises(EndpointError):
            await ReplicaLink.connect(f"unix://{tmp_path}/child.sock", SECRET, "ingress")


CHILD = """
import asyncio, sys
from replicas.channel import ChannelServer, ServerOptions
from tests.replicas.scripted import SECRET, ScriptedEngine
async def main():
    server = ChannelServer(ScriptedEngine(), "child", SECRET, ServerOptions(heartbeat_s=0.1))
    await server.start([sys.argv[1]])
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def run_replica(folder: Path) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(  # noqa: ASYNC220 a real process, to be stopped and killed
        [sys.executable, "-c", CHILD, f"unix://{folder}/child.sock"],
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout is not None
    with process.stdout as stdout:
        assert await asyncio.to_thread(stdout.readline) == b"ready\n"
    return process


async def test_deltas_that_arrived_before_the_loss_are_still_delivered(replica: Replica) -> None:
    link = await ReplicaLink.connect(replica.endpoint, SECRET, "ingress")
    stream, done = link.open(request("r")), link.open(request("done"))
    await until(lambda: len(replica.engine.open) == 2)

    def write(r: object) -> StepDelta:
        engine_id = r.request_id  # type: ignore[attr-defined]
        return StepDelta(engine_id, token_ids=(5,), finish_reason="stop" if "done" in engine_id else None)

    replica.engine.step(write)
    (connection,) = replica.server._connections
    await asyncio.sleep(0.02)
    connection.transport.abort()
    await until(lambda: not link.alive)
    assert (await anext(stream)).token_ids == (5,)
    with pytest.raises(LinkLostError):
        await anext(stream)
    assert [d.finish_reason async for d in done] == ["stop"], "it had ended before"


async def test_a_vanished_ingress_has_its_requests_aborted_and_its_usage_journaled(replica: Replica) -> None:
    link = await ReplicaLink.connect(replica.endpoint, SECRET, "ingress-7")
    link.open(request("one", attempt=2))
    link.open(request("two"))
    other = await ReplicaLink.connect(replica.endpoint, SECRET, "other")
    survivor = other.open(request("survivor"))
    await until(lambda: len(replica.engine.open) == 3)
    write = counting(10)
    replica.engine.step(write)
    replica.engine.step(write)
    link._connection.transport.abort()  # what a SIGKILL looks like from here
    await until(lambda: len(replica.records) == 2, 2.0)
    assert [i.split("/")[1] for i in replica.engine.aborted] == ["one", "two"]
    assert replica.records[0] == UsageRecord(
        request_id="one",
        attempt=2,
        tenant="acme",
        replica_id="replica-1",
        ingress_id="ingress-7",
        num_prompt_tokens=3,
        num_cached_tokens=2,
        num_output_tokens=2,
        num_prior_tokens=0,
        reason=replica.records[0].reason,
        adapter="lora@3",
    )
    assert "connection" in replica.records[0].reason
    for _ in range(8):
        replica.engine.step(write)
    assert [t for d in [d async for d in survivor] for t in d.token_ids] == list(range(10))
    await other.close()


async def test_a_frozen_ingress_is_given_up_although_its_socket_stays_open(replica: Replica) -> None:
    link = await ReplicaLink.connect(replica.endpoint, SECRET, "frozen", LinkOptions(heartbeat_s=60, dead_after_s=60))
    link._connection.transport.pause_reading()  # neither reads nor speaks, as after a SIGSTOP
    link.open(request("r"))
    await until(lambda: replica.engine.open)
    began = time.monotonic()
    await until(lambda: replica.records, 2.0)
    assert 0.2 < time.monotonic() - began < 1.5
    assert replica.records[0].reason.startswith("no sign of life")
    await until(lambda: not replica.engine.open)
    assert replica.server.num_ingresses == 0
    await link.close()


async def test_requests_that_ended_or_were_cancelled_are_not_journaled(replica: Replica) -> None:
    link = await ReplicaLink.connect(replica.endpoint, SECRET, "ingress")
    ended, cancelled = link.open(request("ended")), link.open(request("cancelled"))
    await until(lambda: len(replica.engine.open) == 2)
    cancelled.cancel()
    await until(lambda: len(replica.engine.open) == 1)
    replica.engine.step(counting(1))
    assert [d.finish_reason async for d in ended] == ["length"]
    link._connection.transport.abort()
    await until(lambda: replica.server.num_ingresses == 0)
    assert replica.records == []


async def test_a_busy_event_loop_is_not_taken_for_a_dead_peer(replica: Replica) -> None:
    link = await ReplicaLink.connect(
        replica.endpoint, SECRET, "ingress", LinkOptions(heartbeat_s=0.1, dead_after_s=0.4)
    )
    stream = link.open(request("r"))
    await until(lambda: replica.engine.open)
    await asyncio.sleep(0.3)  # both sides have unread signs of life in their sockets by the end of the stall
    time.sleep(0.6)  # noqa: ASYNC251 the stall is the point
    await asyncio.sleep(0.3)
    assert link.alive
    replica.engine.step(counting(1))
    assert [d.finish_reason async for d in stream] == ["length"]
    await link.close()


async def test_a_journal_that_cannot_write_does_not_stop_the_aborts(replica: Replica, tmp_path: Path) -> None:
    replica.server.options = ServerOptions(journal=JsonLinesJournal(tmp_path / "no-such-folder" / "journal.jsonl"))
    link = await ReplicaLink.connect(replica.endpoint, SECRET, "ingress")
    link.open(request("r"))
    await until(lambda: replica.engine.open)
    link._connection.transport.abort()
    await until(lambda: not replica.engine.open and replica.server.num_ingresses == 0)
    await replica.still_serves()


def test_the_journal_appends_one_json_object_a_line_for_its_owner_only(tmp_path: Path) -> None:
    journal = JsonLinesJournal(tmp_path / "journal.jsonl", wall_clock=lambda: 1700000000.1234)
    record = UsageRecord(
        request_id="r",
        attempt=1,
        tenant="acme",
        replica_id="replica-1",
        ingress_id="i",
        num_prompt_tokens=3,
        num_cached_tokens=0,
        num_output_tokens=5,
        num_prior_tokens=1,
        reason="connection closed by the peer",
    )
    journal([record, record])
    journal([record])
    lines = journal.path.read_bytes().splitlines()
    assert len(lines) == 3
    first = msgspec.json.decode(lines[0])
    assert (first["at"], first["request_id"], first["num_output_tokens"]) == (1700000000.123, "r", 5)
    assert journal.path.stat().st_mode & 0o777 == 0o600
