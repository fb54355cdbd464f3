"""The channel against strangers and impostors: real sockets, hand-made bytes."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from pathlib import Path

import msgspec
import pytest

from replicas.channel import (
    AuthenticationFailedError,
    ChannelServer,
    HandshakeError,
    HandshakeTimeoutError,
    LinkLostError,
    LinkOptions,
    ProtocolError,
    ReplicaLink,
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
from replicas.contract import EngineStats
from tests.replicas.channel_kit import Replica
from tests.replicas.scripted import FACTS, SECRET, ScriptedEngine, counting, request, until


async def greeting(reader: asyncio.StreamReader) -> Challenge | Welcome | Refusal:
    (num_bytes,) = HEADER.unpack(await reader.readexactly(HEADER.size))
    return decode_greeting(await reader.readexactly(num_bytes))


async def is_dropped(reader: asyncio.StreamReader, within_s: float = 5.0) -> bool:
    """Whether the other side ends the connection (what it still says is skipped)."""
    async with asyncio.timeout(within_s):
        try:
            while await reader.read(65536):
                pass
        except ConnectionError:
            pass
    return True


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
    assert await is_dropped(reader), "dropped for the claim, not by the handshake's timeout"
    await replica.still_serves()
    writer.close()


async def test_garbage_costs_its_own_connection_only(replica: Replica) -> None:
    noise = random.Random(7)
    patient = replica.server.options
    replica.hurry()
    for num_bytes in (1, 4, 5, 100, 5000):
        for _ in range(4):
            reader, writer = await replica.raw()
            writer.write(noise.randbytes(num_bytes))
            writer.write(encode(Hello(VERSION, "x", fresh_nonce(), b"proof"))[: num_bytes % 40])
            assert await is_dropped(reader)
            writer.close()
    replica.server.options = patient
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
    replica.hurry()
    reader, writer = await replica.raw()
    began = time.monotonic()

    async def drip() -> None:
        for byte in encode(Hello(VERSION, "slow", fresh_nonce(), b"")):
            writer.write(bytes([byte]))
            await asyncio.sleep(0.05)

    dripping = asyncio.create_task(drip())
    assert await is_dropped(reader)
    assert 0.2 < time.monotonic() - began < 2.5
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
