"""The load generator against the mock: right answers are counted, every wrong one is found."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from ops.bench.asgi import AsgiApp, Exchange, Receive, Scope, Send, serve_asgi
from ops.bench.harness import BenchError
from ops.bench.load import Generator, judge, load_process
from ops.bench.load_spec import AnswerError, Closed, LoadResult, LoadSpec, Open, Quantiles, read_answer
from ops.bench.mock_vllm import Behaviour, MockVllm

NUM_TOKENS = 5


def spec_for(port: int, **more: Any) -> LoadSpec:
    fixed: dict[str, Any] = {
        **{"host": "127.0.0.1", "port": port, "model": "mock"},
        **{"arrivals": Closed(3), "num_requests": 6, "num_tokens": NUM_TOKENS},
    }
    return LoadSpec(**fixed | more)


async def run(app: AsgiApp, **more: Any) -> LoadResult:
    """The load against an app, all in this process."""
    async with serve_asgi(app) as served:
        spec = spec_for(served.port, **more)
        generator = Generator(spec)
        await generator.run()
        return judge(spec, generator.calls, generator.wall_s)


def scripted(body: bytes) -> AsgiApp:
    """An app that answers everything with this SSE body."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        await exchange.body()
        await exchange.begin(200, b"text/event-stream")
        await exchange.write(body, last=True)

    return app


@pytest.fixture(scope="module")
def good_body() -> bytes:
    """What the mock streams for the load generator's kind of request."""

    async def ask() -> bytes:
        async with serve_asgi(MockVllm(Behaviour())) as served:
            spec = spec_for(served.port, num_requests=1)
            generator = Generator(spec)
            await generator.run()
            return b"".join(piece for _, piece in generator.calls[0].pieces)

    return asyncio.run(ask())


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
async def test_right_answers_are_counted_with_their_events_and_tokens(route: str) -> None:
    mock = MockVllm(Behaviour())
    result = await run(mock, route=route)
    assert (result.num_requests, result.num_ok, result.num_rejected, result.num_failed) == (6, 6, 0, 0)
    role_events = 1 if route == "/v1/chat/completions" else 0
    assert result.num_events == 6 * (NUM_TOKENS + role_events)
    assert (result.num_tokens, mock.counts.tokens) == (6 * NUM_TOKENS, 6 * NUM_TOKENS)
    assert (result.faults, mock.counts.by_path) == ((), {route: 6})
    assert result.ttft.p50 is not None and result.latency.max is not None
    assert 0 < result.ttft.p50 <= result.latency.max <= result.wall_s


async def test_a_process_of_its_own_says_the_same() -> None:
    mock = MockVllm(Behaviour())
    async with serve_asgi(mock) as served, load_process(spec_for(served.port)) as load:
        assert mock.counts.requests == 0, "nothing leaves before `go`"
        await load.go()
        assert mock.counts.requests == 6
        result = await load.result()
    assert (result.num_ok, result.num_tokens) == (6, 6 * NUM_TOKENS)


async def test_wrong_answers_fail_the_benchmark_of_the_process() -> None:
    mock = MockVllm(Behaviour(stop_after=NUM_TOKENS - 1))
    async with serve_asgi(mock) as served, load_process(spec_for(served.port)) as load:
        await load.go()
        with pytest.raises(BenchError, match=r"6 of 6 answers were wrong: .*4 tokens in usage, asked for 5"):
            await load.result()


async def test_rejections_do_not_fail_the_benchmark_of_the_process() -> None:
    mock = MockVllm(Behaviour(fail_first=2, fail_status=429))
    async with serve_asgi(mock) as served, load_process(spec_for(served.port)) as load:
        await load.go()
        result = await load.result()
    assert (result.num_ok, result.num_rejected, result.num_failed) == (4, 2, 0)


async def test_load_process_that_dies_is_a_bench_error() -> None:
    with pytest.raises(BenchError, match="the load generator ended with status"):
        async with load_process(spec_for(1, route="/nowhere")):
            raise AssertionError("a wrong spec was taken")


@pytest.mark.parametrize("status", [429, 503])
async def test_refusals_count_as_rejected_and_as_requests_that_never_end(status: int) -> None:
    result = await run(MockVllm(Behaviour(fail_first=2, fail_status=status)))
    assert (result.num_ok, result.num_rejected, result.num_failed) == (4, 2, 0)
    assert result.num_tokens == 4 * NUM_TOKENS
    assert result.ttft.p50 is not None and result.latency.p50 is not None
    assert (result.ttft.p90, result.ttft.max, result.latency.max) == (None, None, None)
    assert result.faults[0].startswith(f"status {status}: ")


async def test_other_errors_count_as_failed() -> None:
    result = await run(MockVllm(Behaviour(status=500)))
    assert (result.num_ok, result.num_rejected, result.num_failed) == (0, 0, 6)
    assert len(result.faults) == 5, "a few tell enough"
    assert result.ttft == Quantiles(None, None, None, None)


async def test_cut_stream_counts_as_failed() -> None:
    result = await run(MockVllm(Behaviour(crash_after_chunks=2)), num_requests=2)
    assert (result.num_ok, result.num_failed) == (0, 2)
    assert result.faults == ("the connection was cut before the answer's end",) * 2


async def test_server_that_is_not_there_counts_as_failed() -> None:
    async with serve_asgi(scripted(b"")) as served:
        port = served.port
    spec = spec_for(port, num_requests=2)
    generator = Generator(spec)
    await generator.run()
    result = judge(spec, generator.calls, generator.wall_s)
    assert (result.num_failed, result.faults[0][:14]) == (2, "cannot connect")


async def test_answer_that_takes_too_long_counts_as_failed() -> None:
    result = await run(MockVllm(Behaviour(ttft_s=30)), timeout_s=0.2, num_requests=2)
    assert (result.num_failed, result.faults) == (2, ("no end within 0.2 s",) * 2)
    assert result.wall_s < 10


Change = Callable[[bytes], bytes]


def without_done(body: bytes) -> bytes:
    return body.removesuffix(b"data: [DONE]\n\n")


def without_last_newlines(body: bytes) -> bytes:
    return body.removesuffix(b"\n\n")


def with_error_event(body: bytes) -> bytes:
    event = b'data: {"error":{"message":"the replica was lost","code":500}}\n\n'
    return without_done(body) + event + b"data: [DONE]\n\n"


def with_two_ends(body: bytes) -> bytes:
    end = next(event for event in body.split(b"\n\n") if b'"length"' in event)
    return body.replace(end, end + b"\n\n" + end)


def without_an_end(body: bytes) -> bytes:
    return body.replace(b'"length"', b"null")


def without_usage(body: bytes) -> bytes:
    return b"\n\n".join(event for event in body.split(b"\n\n") if b'"usage"' not in event)


def with_garbage(body: bytes) -> bytes:
    return b"data: {nothing\n\n" + body


WRONG = [
    (without_done, "not in \\[DONE\\]"),
    (without_last_newlines, "not in \\[DONE\\]"),
    (with_error_event, "error event: .*the replica was lost"),
    (with_two_ends, "finish reasons \\['length', 'length'\\]"),
    (without_an_end, "finish reasons \\[\\]"),
    (without_usage, "None tokens in usage, asked for 5"),
    (lambda body: body.replace(b'"completion_tokens":5', b'"completion_tokens":6'), "6 tokens in usage, asked for 5"),
    (lambda _: b"", "not in \\[DONE\\]"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_changed_answer_is_found(good_body: bytes, change: Change, words: str) -> None:
    assert read_answer(good_body, NUM_TOKENS).num_tokens == NUM_TOKENS
    assert change(good_body) != good_body
    with pytest.raises(AnswerError, match=words):
        read_answer(change(good_body), NUM_TOKENS)


@pytest.mark.parametrize("change", [without_done, with_error_event, without_usage, with_garbage])
async def test_changed_answer_over_the_wire_counts_as_failed(good_body: bytes, change: Change) -> None:
    right = await run(scripted(good_body), num_requests=2)
    assert (right.num_ok, right.num_failed) == (2, 0)
    wrong = await run(scripted(change(good_body)), num_requests=2)
    assert (wrong.num_ok, wrong.num_failed, wrong.num_rejected, wrong.num_tokens) == (0, 2, 0, 0)


async def test_first_token_is_timed_and_not_the_role_before_it(good_body: bytes) -> None:
    role_end = good_body.index(b"\n\n") + 2

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        await exchange.body()
        await exchange.begin(200, b"text/event-stream")
        await exchange.write(good_body[:role_end])
        await asyncio.sleep(0.15)
        await exchange.write(good_body[role_end:], last=True)

    result = await run(app, num_requests=1)
    assert result.num_ok == 1
    assert result.ttft.p50 is not None and result.ttft.p50 >= 0.14
    assert result.gap.max is not None and result.gap.max >= 0.14


class Crowd:
    """The mock, watched: how many requests were under way at once, and on how many connections they came."""

    def __init__(self, **behaviour: Any) -> None:
        self.mock = MockVllm(Behaviour(**behaviour))
        self.running = self.most = 0
        self.clients: set[Any] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.clients.add(scope["client"])
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.mock(scope, receive, send)
        finally:
            self.running -= 1


async def test_closed_arrivals_keep_just_so_many_under_way_on_connections_they_reuse() -> None:
    crowd = Crowd(ttft_s=0.03)
    result = await run(crowd, arrivals=Closed(4), num_requests=12)
    assert result.num_ok == 12
    assert crowd.most == 4
    assert len(crowd.clients) == 4


async def test_open_arrivals_wait_for_nobody() -> None:
    crowd = Crowd(ttft_s=1.0)
    result = await run(crowd, arrivals=Open(100.0, "even"), num_requests=8)
    assert (result.num_ok, crowd.most) == (8, 8)
    assert result.wall_s >= 1.0


async def test_open_arrivals_count_from_the_intended_time_when_the_generator_is_late() -> None:
    mock = MockVllm(Behaviour())

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if mock.counts.requests == 1:
            time.sleep(0.4)  # noqa: ASYNC251 — holds up the generator, which shares this loop
        await mock(scope, receive, send)

    result = await run(app, arrivals=Open(50.0, "even"), num_requests=10)
    assert result.num_ok == 10
    # Those meant to leave at 0.04 to 0.18 s left after 0.42 s.
    assert result.latency.max is not None and result.latency.max >= 0.3
    assert result.latency.p50 is not None and result.latency.p50 >= 0.2


def test_open_arrival_times_are_even_or_poisson_at_the_asked_rate() -> None:
    even = Open(10.0, "even").times(5, random.Random(1))
    assert even == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    poisson = Open(10.0).times(4001, random.Random(1))
    gaps = [later - earlier for earlier, later in pairwise(poisson)]
    assert poisson[0] == 0.0 and min(gaps) > 0
    assert sum(gaps) / len(gaps) == pytest.approx(0.1, rel=0.06)
    assert sum(gap > 0.1 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # 1/e
    assert poisson == Open(10.0).times(4001, random.Random(1))


def test_bodies_repeat_by_seed_and_share_only_the_words_they_should() -> None:
    def texts(**more: Any) -> list[str]:
        bodies = [json.loads(body) for body in spec_for(1, num_words=10, num_shared_words=4, **more).bodies()]
        return [body["messages"][0]["content"] for body in bodies]

    first = texts()
    assert texts() == first
    assert texts(seed=1) != first
    assert len(set(first)) == len(first) == 6
    assert {tuple(text.split()[:4]) for text in [*first, *texts(seed=1)]} == {tuple(first[0].split()[:4])}
    assert {len(text.split()) for text in first} == {14}
    [body] = [json.loads(raw) for raw in spec_for(1, num_requests=1, extra={"ignore_eos": True}).bodies()]
    assert (body["max_tokens"], body["stream"], body["ignore_eos"]) == (NUM_TOKENS, True, True)
    assert body["stream_options"] == {"include_usage": True}


def test_quantiles_take_the_nearest_rank_and_none_for_what_never_ended() -> None:
    hundred = [float(i) for i in range(1, 101)]
    assert Quantiles.of(list(reversed(hundred))) == Quantiles(50.0, 90.0, 99.0, 100.0)
    assert Quantiles.of([1.0, float("inf"), 2.0]) == Quantiles(2.0, None, None, None)
    assert Quantiles.of([]) == Quantiles(None, None, None, None)


async def test_prompts_of_token_ids_go_out_as_they_are_and_every_answer_has_its_times() -> None:
    prompts = ((1, 2, 3), (1, 2, 4))
    spec = spec_for(1, num_requests=2, route="/v1/completions", prompts=prompts)
    assert [json.loads(body)["prompt"] for body in spec.bodies()] == [[1, 2, 3], [1, 2, 4]]
    result = await run(MockVllm(Behaviour()), num_requests=2, route="/v1/completions", prompts=prompts)
    assert len(result.timings) == 2
    ttfts = sorted(timing.ttft_s for timing in result.timings if timing is not None)
    assert result.ttft.max == ttfts[-1]
    assert all(timing is not None and timing.tpot_s >= 0 for timing in result.timings)


async def test_a_wrong_answer_has_no_times(good_body: bytes) -> None:
    result = await run(scripted(good_body.replace(b"data: [DONE]\n\n", b"")), num_requests=2)
    assert (result.num_failed, result.timings) == (2, (None, None))
