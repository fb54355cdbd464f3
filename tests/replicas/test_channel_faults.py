"""Silence, death and vanished peers: real killed and stopped processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import msgspec
import pytest

from replicas.channel import (
    EndpointError,
    JsonLinesJournal,
    LinkLostError,
    LinkOptions,
    ReplicaLink,
    ServerOptions,
    UsageRecord,
)
from replicas.contract import StepDelta
from tests.replicas.channel_kit import Replica, run_replica
from tests.replicas.scripted import SECRET, counting, request, until


async def test_a_replica_that_falls_silent_loses_the_link_within_its_time(tmp_path: Path) -> None:
    async with asyncio.timeout(60):
        process = await run_replica(tmp_path)
        try:
            lost: list[ReplicaLink] = []
            options = LinkOptions(heartbeat_s=0.1, dead_after_s=3.0, on_lost=lost.append)
            link = await ReplicaLink.connect(f"unix://{tmp_path}/child.sock", SECRET, "ingress", options)
            stream = link.open(request("r"))
            await asyncio.sleep(3.3)
            assert link.alive, "an idle replica lives by its heartbeats"
            heard_at = link.stats_at
            await until(lambda: link.stats_at > heard_at)
            os.kill(process.pid, signal.SIGSTOP)
            began = time.monotonic()
            with pytest.raises(LinkLostError, match="no sign of life") as caught:
                await anext(stream)
            assert 2.5 < time.monotonic() - began < 10.0
            assert caught.value.replica_id == "child"
            assert lost == [link]
            with pytest.raises(LinkLostError):
                link.open(request("next"))
        finally:
            process.kill()
            process.wait()


async def test_a_killed_replica_loses_every_stream_at_once(tmp_path: Path) -> None:
    async with asyncio.timeout(60):
        process = await run_replica(tmp_path)
        options = LinkOptions(dead_after_s=60)
        link = await ReplicaLink.connect(f"unix://{tmp_path}/child.sock", SECRET, "ingress", options)
        streams = [link.open(request(f"r{i}")) for i in range(20)]
        readers = [asyncio.create_task(anext(stream)) for stream in streams]  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        process.kill()
        began = time.monotonic()
        outcomes = await asyncio.gather(*readers, return_exceptions=True)
        assert time.monotonic() - began < 5.0, "the end of the file says it, no timeout is needed"
        assert all(isinstance(o, LinkLostError) for o in outcomes)
        process.wait()
        with pytest.raises(EndpointError):
            await ReplicaLink.connect(f"unix://{tmp_path}/child.sock", SECRET, "ingress")


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
    await until(lambda: len(replica.records) == 2, 5.0)
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
    await until(lambda: replica.records, 5.0)
    assert 0.2 < time.monotonic() - began < 5.0
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
        replica.endpoint, SECRET, "ingress", LinkOptions(heartbeat_s=0.1, dead_after_s=0.8)
    )
    stream = link.open(request("r"))
    await until(lambda: replica.engine.open)
    await asyncio.sleep(0.3)  # both sides have unread signs of life in their sockets by the end of the stall
    time.sleep(1.0)  # noqa: ASYNC251 the stall is the point
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
