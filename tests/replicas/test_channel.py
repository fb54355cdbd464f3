"""Two real ends of the channel over real sockets: multiplexing, one frame a step, back-pressure, attempts, cancel."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
import uvloop

from replicas.channel import (
    LinkLostError,
    LinkOptions,
    ReplicaLink,
    ServerOptions,
)
from replicas.channel.frames import (
    HEADER,
    Abort,
    Open,
    Ping,
    Step,
    decode_ingress,
    decode_replica,
    encode,
)
from replicas.contract import Fault, StepDelta, TokenLogprob
from tests.replicas.channel_kit import Pair, read, serving
from tests.replicas.scripted import FACTS, counting, request, until


async def test_two_hundred_streams_over_one_connection_never_mix(pair: Pair) -> None:
    link = await pair.link()
    readers = {f"r{i}": asyncio.create_task(read(link.open(request(f"r{i}")))) for i in range(200)}
    await until(lambda: len(pair.engine.open) == 200)
    write = counting(10)
    for _ in range(10):
        pair.engine.step(write)
        await asyncio.sleep(0)
    assert pair.server.num_ingresses == 1
    for request_id, task in readers.items():
        deltas = await task
        assert [t for d in deltas for t in d.token_ids] == list(range(10))
        assert "".join(d.text for d in deltas) == "".join(f"{request_id}:{i} " for i in range(10))
        assert {d.request_id for d in deltas} == {request_id}
        assert [d.finish_reason for d in deltas if d.finish_reason] == ["length"]
        assert deltas[0].num_cached_tokens == 2
    assert link.num_open == pair.server.num_open == 0


def test_the_channel_runs_on_uvloop_too(tmp_path: Path) -> None:
    async def talk(endpoint: str) -> None:
        async with serving(endpoint) as pair:
            link = await pair.link()
            streams = [link.open(request(f"r{i}")) for i in range(20)]
            await until(lambda: len(pair.engine.open) == 20)
            streams[0].cancel()
            await until(lambda: pair.engine.aborted)
            pair.engine.step(counting(1))
            for stream in streams[1:]:
                assert [d.finish_reason for d in await read(stream)] == ["length"]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(talk(f"unix://{tmp_path}/r.sock"))
        runner.run(talk("tcp://127.0.0.1:0"))


async def test_the_whole_request_arrives_as_it_was_sent(pair: Pair) -> None:
    link = await pair.link()
    sent = request("r", attempt=3)
    link.open(sent)
    await until(lambda: pair.engine.submitted)
    (got,) = pair.engine.submitted
    assert (got.prompt, got.sampling, got.fair_tag, got.deadline_s, got.salt, got.adapter, got.priority) == (
        sent.prompt,
        sent.sampling,
        12.5,
        9.0,
        b"salt",
        "lora@3",
        -1,
    )
    assert (got.attempt, got.tenant) == (3, "acme")


async def test_all_deltas_of_a_step_leave_in_one_write_per_ingress(unix: Pair) -> None:
    links = [await unix.link(f"ingress-{i}", LinkOptions(heartbeat_s=60, dead_after_s=90)) for i in range(2)]
    for i in range(20):
        links[i % 2].open(request(f"r{i}"))
    await until(lambda: len(unix.engine.open) == 20)
    writes: list[bytes] = []
    for connection in unix.server._connections:
        transport = connection.transport
        connection.transport = Tap(transport, writes)  # type: ignore[assignment]
    unix.engine.step(counting(5))
    assert len(writes) == 2
    for write in writes:
        frame = decode_replica(write[4:])
        assert isinstance(frame, Step)
        assert len(frame.deltas) == 10
        assert frame.stats.num_running == 20


class Tap:
    """A transport that also writes down what is written."""

    def __init__(self, inner: asyncio.Transport, writes: list[bytes]) -> None:
        self._inner = inner
        self._writes = writes

    def write(self, data: bytes) -> None:
        self._writes.append(data)
        self._inner.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


async def test_stats_come_with_the_welcome_with_steps_and_with_heartbeats_when_idle(tmp_path: Path) -> None:
    async with serving(f"unix://{tmp_path}/r.sock", ServerOptions(heartbeat_s=0.05)) as pair:
        pair.engine.num_steps = 7
        seen: list[int] = []
        link = await pair.link(options=LinkOptions(on_stats=lambda link: seen.append(link.stats.num_steps)))
        assert (link.replica_id, link.facts, link.stats.num_steps) == ("replica-1", FACTS, 7)
        link.open(request("r"))
        await until(lambda: pair.engine.open)
        pair.engine.step(counting(3))
        await until(lambda: 8 in seen)
        pair.engine.num_steps = 100  # no step: only a heartbeat can tell
        before = link.stats_at
        await until(lambda: link.stats.num_steps == 100)
        assert link.stats_at > before


async def test_a_slow_reader_delays_nobody_and_loses_nothing(unix: Pair) -> None:
    link = await unix.link(options=LinkOptions(high_water=4, low_water=1))
    slow = link.open(request("slow", max_tokens=1000))
    fast = asyncio.create_task(read(link.open(request("fast", max_tokens=1000))))
    await until(lambda: len(unix.engine.open) == 2)
    write = counting(300)
    for _ in range(300):
        unix.engine.step(write)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    fast_deltas = await asyncio.wait_for(fast, 20)  # `slow` was not read at all meanwhile
    assert [t for d in fast_deltas for t in d.token_ids] == list(range(300))
    slow_deltas = await asyncio.wait_for(read(slow), 20)
    assert [t for d in slow_deltas for t in d.token_ids] == list(range(300))
    assert "".join(d.text for d in slow_deltas) == "".join(f"slow:{i} " for i in range(300))
    assert slow_deltas[-1].finish_reason == "length"
    assert len(slow_deltas) < 150, "the replica merged what the reader could not take"
    assert [d.num_cached_tokens for d in slow_deltas if d.num_cached_tokens is not None] == [2]


async def test_an_ingress_that_does_not_read_gets_its_deltas_merged_per_stream(unix: Pair) -> None:
    link = await unix.link(options=LinkOptions(dead_after_s=60))
    readers = [asyncio.create_task(read(link.open(request(f"r{i}", max_tokens=10**6)))) for i in range(3)]
    await until(lambda: len(unix.engine.open) == 3)
    (connection,) = unix.server._connections
    link._connection.transport.pause_reading()
    write = counting(4000)
    for _ in range(4000):  # far more than the socket and its write buffer hold
        unix.engine.step(write)
        if not connection.writable:
            break
    assert not connection.writable
    frames_before = connection.num_frames_sent
    while unix.engine.open:
        unix.engine.step(write)
    assert connection.num_frames_sent == frames_before, "nothing is queued on a socket that is full"
    link._connection.transport.resume_reading()
    for i, reader in enumerate(readers):
        deltas = await asyncio.wait_for(reader, 10)
        assert [t for d in deltas for t in d.token_ids] == list(range(4000))
        assert "".join(d.text for d in deltas) == "".join(f"r{i}:{n} " for n in range(4000))
    assert connection.num_frames_sent <= frames_before + 3


async def test_merged_deltas_keep_logprobs_and_the_fault(unix: Pair) -> None:
    link = await unix.link(options=LinkOptions(high_water=0, low_water=0))
    stream = link.open(request("r"))
    await until(lambda: unix.engine.open)
    (connection,) = unix.server._connections
    n = 0

    def write(r: object) -> StepDelta:
        nonlocal n
        n += 1
        engine_id = next(iter(unix.engine.open))
        prompt = (None, TokenLogprob(7, -0.5)) if n == 1 else None
        logprobs = (TokenLogprob(n, -float(n), ((n, -1.0),)),)
        return StepDelta(engine_id, token_ids=(n,), logprobs=logprobs, prompt_logprobs=prompt)

    for _ in range(3):
        unix.engine.step(write)
        await until(lambda: next(iter(connection.streams.values())).paused)
    fault = Fault("deadline_exceeded", "too late")
    unix.engine.step(lambda r: StepDelta(r.request_id, finish_reason="error", fault=fault))
    deltas = await read(stream)
    assert [t for d in deltas for t in d.token_ids] == [1, 2, 3]
    assert [p.logprob for d in deltas for p in d.logprobs or ()] == [-1.0, -2.0, -3.0]
    assert deltas[0].prompt_logprobs == (None, TokenLogprob(7, -0.5))
    assert (deltas[-1].finish_reason, deltas[-1].fault) == ("error", fault)
    assert len(deltas) == 2


async def test_a_listener_is_told_once_of_all_that_one_read_brought(unix: Pair) -> None:
    link = await unix.link()
    stream = link.open(request("r"))
    await until(lambda: unix.engine.open)
    told: list[list[int]] = []
    stream.listen(lambda: told.append([token_id for delta in stream.ready() for token_id in delta.token_ids]))
    write = counting(9)
    for _ in range(5):
        unix.engine.step(write)  # five frames, written before the other end can read
    await until(lambda: told)
    assert told == [[0, 1, 2, 3, 4]] and not stream.over
    for _ in range(4):
        unix.engine.step(write)
    await until(lambda: stream.over)
    assert told == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
    assert stream.ready() == []


async def test_a_listener_is_told_when_the_link_is_lost(unix: Pair) -> None:
    link = await unix.link()
    stream = link.open(request("r"))
    await until(lambda: unix.engine.open)
    told: list[None] = []
    stream.listen(lambda: told.append(None))
    for connection in unix.server._connections:
        connection.transport.abort()
    await until(lambda: told)
    assert stream.over
    with pytest.raises(LinkLostError):
        while stream.ready():
            pass


async def test_a_stream_that_ends_in_the_read_that_breaks_the_link_is_told(unix: Pair) -> None:
    link = await unix.link()
    ended, broken = link.open(request("a")), link.open(request("b"))
    await until(lambda: len(unix.engine.open) == 2)
    told: list[str] = []
    ended.listen(lambda: told.append("ended"))
    last = Step(link.stats, [StepDelta("a", token_ids=(7,), finish_reason="stop")])
    link._connection.data_received(encode(last) + HEADER.pack(3) + b"\xc1\xc1\xc1")
    assert told == ["ended"]
    assert [delta.token_ids for delta in ended.ready()] == [(7,)]
    with pytest.raises(LinkLostError):
        await anext(broken)


async def test_a_listener_that_raises_keeps_no_other_stream_from_its_news(
    unix: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    link = await unix.link()
    bad, good = link.open(request("bad")), link.open(request("good"))
    await until(lambda: len(unix.engine.open) == 2)
    told: list[str] = []

    def fail() -> None:
        raise ValueError("a bug")

    bad.listen(fail)
    good.listen(lambda: told.append("good"))
    unix.engine.step(counting(3))
    await until(lambda: told)
    assert link.alive and "a bug" in caplog.text


async def test_a_frame_in_pieces_is_one_push_of_the_replicas_state(unix: Pair) -> None:
    pushes: list[ReplicaLink] = []
    link = await unix.link(options=LinkOptions(heartbeat_s=60, dead_after_s=60, on_stats=pushes.append))
    before = len(pushes)
    for byte in encode(Step(link.stats, [])):
        link._connection.data_received(bytes([byte]))
    assert len(pushes) - before == 1


async def test_frames_of_an_older_attempt_are_dropped_on_both_sides(unix: Pair) -> None:
    link = await unix.link()
    old = link.open(request("r", attempt=1))
    await until(lambda: unix.engine.open)
    new = link.open(request("r", attempt=2))
    assert await read(old) == []
    await until(lambda: [r.attempt for r in unix.engine.open.values()] == [2])
    link.send(Open(request("r", attempt=1)))  # late frames of attempt 1, and a repeated one of attempt 2
    link.send(Open(request("r", attempt=2)))
    link.send(Abort("r", 1))
    (connection,) = unix.server._connections
    await until(lambda: connection.num_stale_frames == 3)
    assert [r.attempt for r in unix.engine.submitted] == [1, 2]
    stale = StepDelta("r", attempt=1, token_ids=(99,), finish_reason="stop")
    connection.send(Step(unix.engine.stats(), [stale]))
    unix.engine.step(counting(1))
    deltas = await read(new)
    assert [(d.attempt, d.token_ids, d.finish_reason) for d in deltas] == [(2, (0,), "length")]
    assert link.num_stale_deltas == 1
    with pytest.raises(LinkLostError):
        await link.close()
        link.open(request("r", attempt=3))


async def test_opening_the_same_attempt_twice_is_the_callers_error(unix: Pair) -> None:
    link = await unix.link()
    link.open(request("r", attempt=2))
    with pytest.raises(ValueError, match="attempt 2, not 2"):
        link.open(request("r", attempt=2))
    with pytest.raises(ValueError, match="attempt 2, not 1"):
        link.open(request("r", attempt=1))


async def test_the_same_request_id_from_two_ingresses_is_two_requests(unix: Pair) -> None:
    one, two = await unix.link("a"), await unix.link("b")
    streams = [one.open(request("same")), two.open(request("same"))]
    await until(lambda: len(unix.engine.open) == 2)
    streams[0].cancel()
    await until(lambda: len(unix.engine.open) == 1)
    unix.engine.step(counting(1))
    assert [d.finish_reason for d in await read(streams[1])] == ["length"]


async def test_cancel_aborts_at_the_replica_once_and_ends_the_reader(unix: Pair) -> None:
    link = await unix.link()
    stream = link.open(request("r"))
    reader = asyncio.create_task(read(stream))
    await until(lambda: unix.engine.open)
    unix.engine.step(counting(5))
    await asyncio.sleep(0.02)
    stream.cancel()
    stream.cancel()
    assert len(await reader) == 1
    await until(lambda: unix.engine.aborted)
    await asyncio.sleep(0.02)
    assert len(unix.engine.aborted) == 1
    assert unix.server.num_open == link.num_open == 0
    (connection,) = unix.server._connections
    assert connection.num_stale_frames == 0


async def test_a_paused_stream_can_be_cancelled(unix: Pair) -> None:
    link = await unix.link(options=LinkOptions(high_water=1, low_water=0))
    stream = link.open(request("r"))
    await until(lambda: unix.engine.open)
    write = counting(50)
    for _ in range(50):
        unix.engine.step(write)
        await asyncio.sleep(0.001)
    assert unix.server.num_open == 1, "the end waits at the replica for the reader"
    stream.cancel()
    await until(lambda: unix.server.num_open == 0)
    assert unix.engine.aborted == [], "the engine had finished it long before"


async def test_a_prefetch_reaches_the_replica_and_a_word_out_of_turn_every_ingress(tmp_path: Path) -> None:
    wanted: list[str] = []
    options = ServerOptions(heartbeat_s=5.0, dead_after_s=15.0, prefetch=wanted.append)
    async with serving(f"unix://{tmp_path}/r.sock", options) as pair:
        slow = LinkOptions(heartbeat_s=5.0, dead_after_s=15.0)
        links = [await pair.link(name, slow) for name in ("one", "two")]
        links[0].prefetch("a@1")
        links[1].prefetch("b@2")
        await until(lambda: len(wanted) == 2)
        assert sorted(wanted) == ["a@1", "b@2"]
        before = [link.stats_at for link in links]
        pair.server.announce()
        await until(lambda: all(link.stats_at > at for link, at in zip(links, before, strict=True)))
        await pair.server.drain()
        links[0].prefetch("c@1")
        stream = links[0].open(request("late"))
        assert (await read(stream))[-1].finish_reason == "error"
        assert len(wanted) == 2, "a replica that drains loads nothing more"


def test_a_ping_of_an_older_ingress_wants_no_adapter() -> None:
    older = msgspec.msgpack.encode([20])
    assert decode_ingress(older) == Ping()
    assert msgspec.msgpack.decode(encode(Ping(("a@1",)))[4:]) == [20, ["a@1"]], "what older replicas skip comes last"
