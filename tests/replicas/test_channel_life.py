"""Refusals, drain, close, and the endpoints a channel listens on."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from replicas.channel import (
    EndpointError,
    FrameTooLargeError,
    LinkLostError,
    LinkOptions,
    ReplicaLink,
    ServerOptions,
)
from replicas.channel.frames import (
    Step,
    encode,
)
from replicas.contract import Fault, StepDelta
from tests.replicas.channel_kit import Pair, read, serving
from tests.replicas.scripted import SECRET, ScriptedEngine, counting, request, until


async def test_a_refused_request_ends_in_one_delta_with_the_fault(pair: Pair) -> None:
    fault = Fault("context_length_exceeded", "needed=9 max=8", param="prompt")
    pair.engine.refuse["too-long"] = fault
    link = await pair.link()
    (delta,) = await read(link.open(request("too-long")))
    assert (delta.request_id, delta.finish_reason, delta.fault) == ("too-long", "error", fault)
    assert pair.server.num_open == 0


async def test_a_bug_in_submit_costs_its_own_request_only(unix: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    link = await unix.link()
    good = link.open(request("good"))
    await until(lambda: unix.engine.open)
    monkeypatch.setattr(unix.engine, "submit", lambda request: 1 / 0)
    (delta,) = await read(link.open(request("bad")))
    assert delta.fault is not None
    assert delta.fault.code == "internal"
    unix.engine.step(counting(1))
    assert [d.finish_reason for d in await read(good)] == ["length"]


async def test_draining_refuses_new_requests_and_waits_for_the_running_ones(unix: Pair) -> None:
    link = await unix.link(options=LinkOptions(heartbeat_s=60, dead_after_s=90))
    running = link.open(request("running"))
    await until(lambda: unix.engine.open)
    drain = asyncio.create_task(unix.server.drain())
    await until(lambda: link.stats.draining)
    (delta,) = await read(link.open(request("late")))
    assert delta.fault is not None
    assert (delta.fault.code, delta.fault.retryable) == ("draining", True)
    assert not drain.done()
    unix.engine.step(counting(1))
    assert [d.finish_reason for d in await read(running)] == ["length"]
    await asyncio.wait_for(drain, 10)


async def test_drain_waits_for_a_paused_reader_to_take_the_end(unix: Pair) -> None:
    link = await unix.link(options=LinkOptions(high_water=1, low_water=0))
    stream = link.open(request("r"))
    await until(lambda: unix.engine.open)
    write = counting(20)
    for _ in range(20):
        unix.engine.step(write)
        await asyncio.sleep(0.001)
    drain = asyncio.create_task(unix.server.drain())
    await asyncio.sleep(0.05)
    assert not drain.done()
    assert len([t for d in await read(stream) for t in d.token_ids]) == 20
    await asyncio.wait_for(drain, 10)


async def test_closing_the_server_ends_open_requests_with_engine_dead_and_then_the_link(pair: Pair) -> None:
    lost: list[str] = []
    link = await pair.link(options=LinkOptions(on_lost=lambda link: lost.append(link.replica_id)))
    stream = link.open(request("r"))
    await until(lambda: pair.engine.open)
    await pair.server.close()
    (delta,) = await read(stream)
    assert delta.fault is not None
    assert delta.fault.code == "engine_dead"
    await until(lambda: lost)
    assert lost == ["replica-1"]
    assert not link.alive


async def test_a_failed_engine_ends_what_is_open_and_refuses_what_comes(unix: Pair) -> None:
    link = await unix.link()
    stream = link.open(request("r"))
    await until(lambda: unix.engine.open)
    fault = Fault("engine_dead", "no progress for 7 s", retryable=True)
    unix.server.fail_open(fault)
    assert [d.fault for d in await read(stream)] == [fault]
    assert [d.fault for d in await read(link.open(request("next")))] == [fault]


async def test_closing_a_link_aborts_its_requests_and_raises_for_its_readers(unix: Pair) -> None:
    records: list[object] = []
    unix.server.options = ServerOptions(journal=records.extend)
    lost: list[ReplicaLink] = []
    link = await unix.link(options=LinkOptions(on_lost=lost.append))
    stream = link.open(request("r"))
    await until(lambda: unix.engine.open)
    await link.close()
    await link.close()
    with pytest.raises(LinkLostError, match="closed by this side"):
        await read(stream)
    await until(lambda: not unix.engine.open and unix.server.num_ingresses == 0)
    assert lost == [], "the owner knows: it closed the link"
    assert records == [], "an ingress that says goodbye closes its own records"


async def test_a_request_beyond_the_frame_bound_is_refused_before_it_is_sent(unix: Pair) -> None:
    link = await unix.link(options=LinkOptions(max_frame_bytes=1000))
    with pytest.raises(FrameTooLargeError, match="allowed 1000"):
        link.open(request("r", num_prompt=500))
    assert link.num_open == 0
    link.open(request("r"))
    await until(lambda: unix.engine.open)


async def test_a_prompt_of_two_million_tokens_crosses_in_many_reads(pair: Pair) -> None:
    link = await pair.link()
    big = request("big", num_prompt=2_000_000)
    link.open(big)
    link.open(request("small"))
    await until(lambda: len(pair.engine.submitted) == 2, 10)
    assert pair.engine.submitted[0].prompt == big.prompt


async def test_a_socket_file_is_for_its_owner_only_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "r.sock"
    async with serving(f"unix://{path}"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert not path.exists()


async def test_a_stale_socket_file_is_replaced_but_a_live_one_and_a_plain_file_are_not(tmp_path: Path) -> None:
    path = tmp_path / "r.sock"
    async with serving(f"unix://{path}"):
        with pytest.raises(EndpointError, match="in use by a running server"):
            async with serving(f"unix://{path}"):
                pass
        os.rename(path, tmp_path / "left-behind")
    os.rename(tmp_path / "left-behind", path)  # its server is gone now
    async with serving(f"unix://{path}") as pair:
        await pair.link()
    path.write_text("a note")
    with pytest.raises(EndpointError, match="not a socket"):
        async with serving(f"unix://{path}"):
            pass
    assert path.read_text() == "a note"


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("unix:///tmp/" + "x" * 103, "has 108 bytes, the system allows 107: choose a shorter run folder"),
        ("unix://relative", "neither unix"),
        ("tcp://host", "neither unix"),
        ("tcp://host:99999", "neither unix"),
        ("http://host:1", "neither unix"),
        ("unix:///nonexistent-folder/r.sock", "No such file"),
    ],
)
async def test_an_unusable_endpoint_is_refused_with_its_reason(endpoint: str, message: str) -> None:
    with pytest.raises(EndpointError, match=message):
        async with serving(endpoint):
            pass
    with pytest.raises(EndpointError):
        await ReplicaLink.connect(endpoint, SECRET, "ingress")


async def test_connecting_where_nobody_listens_is_an_endpoint_error(tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="cannot reach unix"):
        await ReplicaLink.connect(f"unix://{tmp_path}/nobody.sock", SECRET, "ingress")


def test_a_step_frame_of_64_deltas_stays_small() -> None:
    deltas = [StepDelta(f"chatcmpl-{i:024x}", token_ids=(1234,), text=" token") for i in range(64)]
    frame = encode(Step(ScriptedEngine().stats(), deltas))
    assert len(frame) < 64 * 80
