"""The whole request path in one test process: HTTP, queue, routing, channel, sim replicas, a real Valkey."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn

from configs.runtime import Runtime
from configs.schema import (
    AdmissionConfig,
    ChannelConfig,
    Config,
    EngineConfig,
    GroupConfig,
    ModelConfig,
    SimConfig,
    TenantConfig,
)
from gateway.compose import ComposedGateway, compose
from gateway.dispatch import FleetDispatcher
from replicas.host import ReplicaHost
from tests.routing.conftest import Valkey

SLOW_S, FAST_S = 0.2, 0.002
ROOT = Path(__file__).parents[2]
QUICK = EngineConfig(kind="sim", max_num_seqs=8, sim=SimConfig(step_base_s=FAST_S))
ONE_AT_A_TIME = EngineConfig(kind="sim", max_num_seqs=1, sim=SimConfig(step_base_s=SLOW_S))

PATIENT = ChannelConfig(heartbeat_s=0.2, dead_after_s=5.0)
"""Who is killed closes its socket; who is silent may be on a machine that stands still for a moment."""


@dataclass
class Stack:
    """One ingress behind uvicorn and as many sim replica processes as a test starts."""

    runtime: Runtime
    valkey: Valkey
    config: Config
    composed: ComposedGateway
    server: uvicorn.Server
    client: httpx.AsyncClient
    processes: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    hosts: list[ReplicaHost] = field(default_factory=list)

    async def replica(self, replica_id: str, step_s: float = FAST_S) -> None:
        """Starts a replica and waits until it is ready here."""
        before = self.num_ready
        engine = EngineConfig(kind="sim", max_num_seqs=8, sim=SimConfig(step_base_s=step_s))
        config = msgspec.structs.replace(self.config, groups=(GroupConfig(name="g", model="m", engine=engine),))
        files = {"config": msgspec.json.encode(config), "runtime": msgspec.json.encode(self.runtime, enc_hook=str)}
        paths = []
        for name, content in files.items():
            paths.append(self.runtime.run_dir / f"{replica_id}-{name}.json")
            paths[-1].write_bytes(content)
        command = [sys.executable, "-m", "tests.gateway.replica_main", *map(str, paths), replica_id]
        self.processes[replica_id] = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
        await until(lambda: self.num_ready > before, 20.0)

    async def host(self, model_id: str, engine: EngineConfig = QUICK) -> ReplicaHost:
        """Starts a replica of a model in this process and waits until it is ready here."""
        before = self.composed.gateway.dispatcher.num_ready(model_id)
        (group,) = [g for g in self.config.groups if g.model == model_id]
        group = msgspec.structs.replace(group, engine=engine)
        self.hosts.append(ReplicaHost(self.config, group, self.runtime, f"{model_id}-{len(self.hosts)}"))
        await self.hosts[-1].start()
        await until(lambda: self.composed.gateway.dispatcher.num_ready(model_id) > before)
        return self.hosts[-1]

    def kill(self, replica_id: str) -> None:
        """SIGKILL: no farewell to anyone."""
        self.processes[replica_id].kill()

    @property
    def address(self) -> tuple[str, int]:
        url = self.client.base_url
        return url.host, url.port or 80

    @property
    def num_ready(self) -> int:
        return self.composed.gateway.dispatcher.num_ready("m")

    @property
    def busiest(self) -> str:
        """The replica with requests of ours."""
        return max(self.composed.fleet.states("m"), key=lambda s: s.num_running + s.num_waiting + s.num_sent).replica_id

    def idle(self) -> bool:
        admission = self.composed.admission
        states = [state for model in self.config.models for state in self.composed.fleet.states(model.id)]
        in_flight = sum(s.num_running + s.num_waiting + s.num_sent for s in states)
        return not (admission.num_waiting or admission.num_unplaced or in_flight)


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    folder = Path(tempfile.mkdtemp(prefix="wg-test-"))
    server = Valkey(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder)


def one_model() -> Config:
    """Model `m`."""
    return Config(
        cluster="test",
        models=(ModelConfig(id="m", source="sim:bytes", default_max_tokens=64),),
        groups=(GroupConfig(name="g", model="m"),),
        tenants=(TenantConfig(id="local", anonymous=True),),
        channel=PATIENT,
        admission=AdmissionConfig(max_ahead_per_replica=4),
    )


@pytest.fixture
async def stack(valkey: Valkey) -> AsyncIterator[Stack]:
    """One model, `m`, and no replica yet."""
    async with running(one_model(), valkey) as stack:
        yield stack


@pytest.fixture
async def two_models(valkey: Valkey) -> AsyncIterator[Stack]:
    """`m` and `n` behind one address, and no replica yet."""
    config = Config(
        cluster="test",
        models=tuple(ModelConfig(id=name, source="sim:bytes", aliases=(f"org/{name}",)) for name in "mn"),
        groups=tuple(GroupConfig(name=f"group-{name}", model=name) for name in "mn"),
        tenants=(TenantConfig(id="local", anonymous=True),),
        channel=PATIENT,
        admission=AdmissionConfig(max_ahead_per_replica=1),
    )
    async with running(config, valkey) as stack:
        yield stack


@contextlib.asynccontextmanager
async def running(config: Config, valkey: Valkey) -> AsyncIterator[Stack]:
    folder = valkey.path.parent
    runtime = Runtime(run_dir=folder, home=folder, redis_url=valkey.url, secret=b"s" * 32, instance="test")
    composed = await compose(config, runtime)
    await composed.start()
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(composed.app, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=30, trust_env=False)
    stack = Stack(runtime, valkey, config, composed, server, client)
    try:
        await until(lambda: server.started)
        yield stack
    finally:
        await client.aclose()
        server.should_exit = True
        await serving
        await composed.close()
        for host in stack.hosts:
            await host.close()
        for process in stack.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def body(content: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content}], "ignore_eos": True, **fields}


async def events(response: httpx.Response) -> AsyncIterator[Any]:
    """What comes after each `data: `, decoded; `[DONE]` as it is."""
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


async def text_of(stack: Stack, **fields: Any) -> str:
    answer = await stack.client.post("/v1/chat/completions", json=body(**fields))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


async def until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    for _ in range(round(seconds / 0.01)):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within {seconds} s")


async def test_chat_is_answered_whole_and_streamed_alike_by_two_replicas(stack: Stack) -> None:
    await stack.replica("a")
    await stack.replica("b")
    assert (await stack.client.get("/ready")).status_code == 200
    whole = await text_of(stack, seed=7, max_tokens=20)
    assert len(whole) == 20
    streamed, last = "", None
    async with stack.client.stream("POST", "/v1/chat/completions", json=body(seed=7, max_tokens=20, stream=True)) as r:
        assert r.status_code == 200
        async for event in events(r):
            if event != "[DONE]":
                streamed += event["choices"][0]["delta"].get("content") or ""
            last = event
    assert streamed == whole
    assert last == "[DONE]"
    await until(stack.idle)


async def test_many_at_once_never_mix_and_leave_nothing_behind(stack: Stack) -> None:
    await stack.replica("a")
    await stack.replica("b")
    alone = [await text_of(stack, content=f"question {i}", seed=i, max_tokens=12) for i in range(6)]
    together = await asyncio.gather(
        *(text_of(stack, content=f"question {i % 6}", seed=i % 6, max_tokens=12) for i in range(60))
    )
    assert list(together) == [alone[i % 6] for i in range(60)]
    await until(stack.idle)


async def test_a_replica_killed_before_the_first_token_is_not_noticed(stack: Stack) -> None:
    await stack.replica("a", step_s=SLOW_S)
    await stack.replica("b", step_s=SLOW_S)
    expected = await text_of(stack, content="who are you?", seed=3, max_tokens=3)
    asking = asyncio.create_task(text_of(stack, content="who are you?", seed=3, max_tokens=3))
    await until(lambda: not stack.idle())
    stack.kill(stack.busiest)
    assert await asking == expected
    assert stack.num_ready == 1
    assert 'warmgate_retries_total{reason="lost"} 1.0' in (await stack.client.get("/metrics")).text


async def test_a_replica_killed_later_is_an_error_event_soon(stack: Stack) -> None:
    await stack.replica("a", step_s=0.05)
    await stack.replica("b", step_s=0.05)
    seen: list[Any] = []
    killed_at = 0.0
    async with stack.client.stream("POST", "/v1/chat/completions", json=body(max_tokens=500, stream=True)) as response:
        async for event in events(response):
            seen.append(event)
            if len(seen) == 5:
                stack.kill(stack.busiest)
                killed_at = time.monotonic()
    assert time.monotonic() - killed_at < 3.0
    assert seen[-1]["error"]["code"] == "replica_lost"
    assert "[DONE]" not in seen
    assert await text_of(stack, max_tokens=3), "the other one serves on"
    await until(stack.idle)


async def test_a_replica_that_freezes_is_as_good_as_dead(valkey: Valkey) -> None:
    hasty = ChannelConfig(heartbeat_s=0.2, dead_after_s=2.0)
    async with running(msgspec.structs.replace(one_model(), channel=hasty), valkey) as stack:
        await stack.replica("a", step_s=0.05)
        await stack.replica("b", step_s=0.05)
        seen: list[Any] = []
        frozen_at = 0.0
        asked = body(max_tokens=500, stream=True)
        async with stack.client.stream("POST", "/v1/chat/completions", json=asked) as response:
            async for event in events(response):
                seen.append(event)
                if len(seen) == 5:
                    stack.processes[stack.busiest].send_signal(signal.SIGSTOP)
                    frozen_at = time.monotonic()
        assert time.monotonic() - frozen_at < 6.0
        assert seen[-1]["error"]["code"] == "replica_lost"
        assert await text_of(stack, max_tokens=3)


async def test_a_replica_that_drains_finishes_what_it_has_and_gets_nothing_new(stack: Stack) -> None:
    await stack.replica("a", step_s=0.03)
    await stack.replica("b", step_s=0.03)
    seen: list[Any] = []
    async with stack.client.stream("POST", "/v1/chat/completions", json=body(max_tokens=40, stream=True)) as response:
        async for event in events(response):
            seen.append(event)
            if len(seen) == 3:
                draining = stack.busiest
                stack.processes[draining].terminate()
                await until(lambda: stack.num_ready == 1)
                assert await text_of(stack, max_tokens=3)
    assert seen[-1] == "[DONE]"
    assert sum(bool(e["choices"][0]["delta"].get("content")) for e in seen[:-1]) >= 38
    assert await asyncio.wait_for(stack.processes[draining].wait(), 30) == 0
    assert stack.num_ready == 1


async def test_a_client_that_reads_slowly_loses_nothing_and_holds_up_nobody(stack: Stack) -> None:
    await stack.replica("a", step_s=0.0005)
    reader, writer = await asyncio.open_connection(*stack.address, limit=2**12)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
    asked = json.dumps(body(max_tokens=4000, stream=True, seed=5, stream_options={"include_usage": True})).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(asked)}\r\n\r\n"
    writer.write(head.encode() + asked)
    await reader.readuntil(b"data: ")
    await asyncio.sleep(1.0)
    assert len(await asyncio.wait_for(text_of(stack, max_tokens=20), 10)) > 0
    assert not stack.idle(), "its stream waits at the replica, not in the ingress's memory"
    received = await asyncio.wait_for(reader.read(-1), 60)
    writer.close()
    assert received.count(b"data: [DONE]") == 1
    assert b'"completion_tokens":4000' in received
    await until(stack.idle)


async def test_a_client_that_leaves_frees_its_place(stack: Stack) -> None:
    await stack.replica("a", step_s=0.02)
    async with stack.client.stream("POST", "/v1/chat/completions", json=body(max_tokens=5000, stream=True)) as response:
        async for _ in events(response):
            break
    await until(stack.idle)
    assert not stack.composed.fleet._slots["a"].num_in_flight


async def test_requests_wait_for_a_replica_that_is_being_replaced(stack: Stack) -> None:
    await stack.replica("a")
    await text_of(stack, max_tokens=3)
    stack.kill("a")
    await until(lambda: not stack.num_ready)
    asking = asyncio.create_task(text_of(stack, max_tokens=3))
    await asyncio.sleep(0.2)
    assert not asking.done()
    await stack.replica("a2")
    assert await asking


async def test_redis_killed_costs_no_request(stack: Stack) -> None:
    await stack.replica("a")
    stack.valkey.kill()
    for i in range(5):
        assert await text_of(stack, content=f"{i}", max_tokens=3)


async def test_where_a_request_went_can_be_asked(stack: Stack) -> None:
    await stack.replica("a")
    await text_of(stack, content="x" * 200, max_tokens=2)
    dispatcher = stack.composed.gateway.dispatcher
    assert isinstance(dispatcher, FleetDispatcher)
    (request_id,) = dispatcher.router.log._traces
    decision = dispatcher.decision(f"{request_id}-0")
    assert decision is not None and decision.replica_id == "a"
    assert set(decision.candidates[0].terms_s) >= {"queue", "prefill"}


async def test_two_models_behind_one_address_answer_under_their_names_and_aliases(two_models: Stack) -> None:
    for name in "mn":
        host = await two_models.host(name)
        by_name, by_alias = [
            await two_models.client.post("/v1/chat/completions", json=body(model=asked, seed=1, max_tokens=9))
            for asked in (name, f"org/{name}")
        ]
        assert by_name.status_code == by_alias.status_code == 200, by_name.text
        assert by_name.json()["model"] == by_alias.json()["model"] == name
        assert by_name.json()["choices"] == by_alias.json()["choices"]
        assert by_name.headers["x-warmgate-replica"] == by_alias.headers["x-warmgate-replica"] == host.replica_id
    assert (await two_models.client.get("/ready")).json()["replicas"] == {"m": 1, "n": 1}
    assert {"m", "n"} <= {model["id"] for model in (await two_models.client.get("/v1/models")).json()["data"]}
    unknown = await two_models.client.post("/v1/chat/completions", json=body(model="o"))
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_the_backlog_of_one_model_does_not_hold_up_another(two_models: Stack) -> None:
    await two_models.host("m", ONE_AT_A_TIME)
    await two_models.host("n")
    admission = two_models.composed.admission
    backlog = [asyncio.create_task(text_of(two_models, max_tokens=1000)) for _ in range(8)]
    await until(lambda: admission.num_waiting >= 6)
    async with asyncio.timeout(20.0):
        for _ in range(4):
            assert await text_of(two_models, model="n", max_tokens=3)
    assert admission.num_waiting >= 6, "those of the other model wait still"
    for asking in backlog:
        assert not asking.done()
        asking.cancel()
    await asyncio.gather(*backlog, return_exceptions=True)
    await until(two_models.idle)


async def test_a_model_without_a_replica_holds_up_only_itself(two_models: Stack) -> None:
    await two_models.host("n")
    never_there = await two_models.client.post("/v1/chat/completions", json=body())
    assert (never_there.status_code, never_there.headers["retry-after"]) == (503, "5")
    assert (await two_models.client.get("/ready")).json()["error"]["message"] == "No replica is ready for: m."
    assert await text_of(two_models, model="n", max_tokens=3)
    gone = await two_models.host("m")
    await gone.close()
    await until(lambda: not two_models.num_ready)
    asking = asyncio.create_task(text_of(two_models, max_tokens=3))
    await until(lambda: two_models.composed.admission.num_waiting == 1)
    assert await text_of(two_models, model="n", max_tokens=3)
    assert not asking.done()
    await two_models.host("m")
    assert await asking


async def test_an_ingress_starts_at_once_and_closes_twice_without_redis_or_replicas(tmp_path: Path) -> None:
    config = Config(
        models=(ModelConfig(id="m", source="sim:bytes"),),
        groups=(GroupConfig(name="g", model="m"),),
        tenants=(TenantConfig(id="t", anonymous=True),),
    )
    runtime = Runtime(tmp_path, tmp_path, f"unix://{tmp_path}/none.sock", b"s" * 32, "test")
    composed = await compose(config, runtime)
    began = time.monotonic()
    await composed.start()
    assert time.monotonic() - began < 3.0
    composed.check_health()
    await composed.close()
    await composed.close()
    with pytest.raises(RuntimeError):
        composed.check_health()


def test_the_ingress_imports_neither_torch_nor_transformers_nor_ray() -> None:
    heavy = ("torch", "transformers", "ray", "vllm")
    code = f"import sys, gateway.compose; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
