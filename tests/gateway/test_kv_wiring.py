"""Two ingresses, four sim replicas, one Valkey: what the replicas hold is what both ingresses know."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from configs.runtime import Runtime
from configs.schema import ChannelConfig, Config, EngineConfig, GroupConfig, ModelConfig, SimConfig, TenantConfig
from gateway.compose import ComposedGateway, compose
from replicas.host import HostOptions, ReplicaHost
from routing.types import RouteRequest
from tests.routing.conftest import Valkey

BLOCK_TOKENS = 32
ENGINE = EngineConfig(kind="sim", max_num_seqs=8, sim=SimConfig(step_base_s=0.002, num_blocks=256))
CONFIG = Config(
    cluster="test",
    models=(ModelConfig(id="m", source="sim:bytes", default_max_tokens=2, route_block_tokens=BLOCK_TOKENS),),
    groups=(GroupConfig(name="g", model="m", engine=ENGINE),),
    tenants=(TenantConfig(id="local", anonymous=True),),
    channel=ChannelConfig(heartbeat_s=0.2, dead_after_s=2.0),
)


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


class Cluster:
    """Replicas and ingresses in this process; every ingress is asked over its ASGI app."""

    def __init__(self, valkey: Valkey) -> None:
        folder = valkey.path.parent
        self.valkey = valkey
        self.runtime = Runtime(folder, folder, valkey.url, b"s" * 32, "test")
        self.hosts: list[ReplicaHost] = []
        self.ingresses: list[ComposedGateway] = []
        self._clients: dict[int, httpx.AsyncClient] = {}
        self._last: dict[int, RouteRequest] = {}

    async def host(self, clock: Callable[[], float] = time.time) -> ReplicaHost:
        host = ReplicaHost(CONFIG, CONFIG.groups[0], self.runtime, f"r{len(self.hosts)}", HostOptions(wall_clock=clock))
        await host.start()
        self.hosts.append(host)
        return host

    async def ingress(self) -> ComposedGateway:
        composed = await compose(CONFIG, self.runtime)
        self.ingresses.append(composed)
        transport = httpx.ASGITransport(app=composed.app)  # type: ignore[arg-type]
        self._clients[id(composed)] = httpx.AsyncClient(transport=transport, base_url="http://ingress")
        await composed.start()
        return composed

    async def ask(self, ingress: ComposedGateway, prompt: str) -> dict[str, Any]:
        """One completion; the answer, with `replica` in it."""
        body = {"model": "m", "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
        answer = await self._clients[id(ingress)].post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return {**found, "replica": answer.headers["x-warmgate-replica"]}

    def known(self, ingress: ComposedGateway) -> list[dict[str, int]]:
        """What an ingress's index says of each replica's routing blocks."""
        index = ingress.fleet.index
        publishers = [host._publisher for host in self.hosts]
        return [index.match([block]) for publisher in publishers if publisher for block in publisher.blocks.held]

    def agree(self) -> bool:
        """Whether every ingress knows every block of every replica, for certain, and no others."""
        for ingress in self.ingresses:
            index = ingress.fleet.index
            for host in self.hosts:
                publisher = host._publisher
                assert publisher is not None and host._server is not None
                held = publisher.blocks.held
                if publisher.blocks.kv_seq < host._server.stats().kv_seq:
                    return False  # it has not looked itself
                if not index.is_exact(host.replica_id) or index.num_held(host.replica_id) != len(held):
                    return False
                if not all(host.replica_id in index.match([block]) for block in held):
                    return False
        return True

    async def close(self) -> None:
        for client in self._clients.values():
            await client.aclose()
        for ingress in self.ingresses:
            await ingress.close()
        for host in self.hosts:
            await host.close()


@pytest.fixture
async def cluster(valkey: Valkey) -> AsyncIterator[Cluster]:
    cluster = Cluster(valkey)
    try:
        yield cluster
    finally:
        with contextlib.suppress(AssertionError):
            valkey.signal(signal.SIGCONT)
        await cluster.close()


async def until(holds: Callable[[], bool], seconds: float) -> float:
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


def long_prompt(number: int) -> str:
    return f"{number:04d} " * 60  # ten routing blocks


async def test_two_ingresses_agree_about_four_replicas_within_a_second_and_so_does_a_third(cluster: Cluster) -> None:
    clocks = (time.time, lambda: time.time() + 7200.0, lambda: time.time() - 86400.0, lambda: 5.0)
    for clock in clocks:
        await cluster.host(clock)
    one, two = await cluster.ingress(), await cluster.ingress()
    assert not one.fleet.index.guessed
    await asyncio.gather(*(cluster.ask(one if i % 2 else two, long_prompt(i)) for i in range(24)))
    assert await until(cluster.agree, 5.0) < 1.0
    assert sum(cluster.ingresses[0].fleet.index.num_held(host.replica_id) for host in cluster.hosts) >= 24 * 8
    began = time.monotonic()
    third = await cluster.ingress()
    assert time.monotonic() - began < 1.0
    assert cluster.agree()
    for i in range(24):  # what one ingress warmed, the others find
        answers = [await cluster.ask(ingress, long_prompt(i)) for ingress in (one, two, third)]
        assert len({answer["replica"] for answer in answers}) == 1
        assert all(answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 250 for answer in answers)


async def test_evictions_are_known_within_a_second(cluster: Cluster) -> None:
    host = await cluster.host()
    ingress = await cluster.ingress()
    first = await cluster.ask(ingress, long_prompt(0))
    await until(cluster.agree, 2.0)
    before = cluster.known(ingress)
    assert before and all(before)
    for i in range(1, 40):  # more than the cache holds
        await cluster.ask(ingress, long_prompt(i))
    assert await until(cluster.agree, 5.0) < 1.0
    capacity = host._publisher.blocks.num_engine_blocks if host._publisher else 0
    assert ingress.fleet.index.num_held(first["replica"]) * 2 <= capacity <= 256


async def test_a_burst_with_one_new_prefix_stays_together_at_every_ingress(cluster: Cluster) -> None:
    for _ in range(4):
        await cluster.host()
    ingress = await cluster.ingress()
    answers = await asyncio.gather(*(cluster.ask(ingress, long_prompt(7)) for _ in range(6)))
    assert len({answer["replica"] for answer in answers}) == 1


async def test_a_frozen_redis_costs_no_request_and_leaves_guesses_that_thaw_into_certainty(cluster: Cluster) -> None:
    for _ in range(2):
        await cluster.host()
    ingress = await cluster.ingress()
    warm = await cluster.ask(ingress, long_prompt(0))
    await until(cluster.agree, 2.0)
    cluster.valkey.signal(signal.SIGSTOP)
    frozen_at = time.monotonic()
    while len(ingress.fleet.index.guessed) < 1:
        assert time.monotonic() - frozen_at < 3.0
        await cluster.ask(ingress, long_prompt(round(1000 * (time.monotonic() - frozen_at))))
    assert time.monotonic() - frozen_at < 2.5
    for _ in range(3):
        again = await cluster.ask(ingress, long_prompt(0))
        assert again["replica"] == warm["replica"], "what it knew, and what it sent, still counts"
    cluster.valkey.signal(signal.SIGCONT)
    await until(cluster.agree, 5.0)


async def test_a_replica_that_dies_and_comes_back_is_cold_at_once(cluster: Cluster) -> None:
    host = await cluster.host()
    ingress = await cluster.ingress()
    await cluster.ask(ingress, long_prompt(0))
    await until(cluster.agree, 2.0)
    assert all(cluster.known(ingress))
    blocks = list(host._publisher.blocks.held) if host._publisher else []
    await host.close()
    cluster.hosts.clear()
    await until(lambda: ingress.fleet.num_ready("m") == 0, 3.0)
    assert ingress.fleet.index.match(blocks) == {}
    await cluster.host()
    await until(lambda: ingress.fleet.num_ready("m") == 1, 3.0)
    assert ingress.fleet.index.match(blocks) == {}
    await until(cluster.agree, 2.0)


async def test_the_registry_can_be_watched(cluster: Cluster) -> None:
    await cluster.host()
    ingress = await cluster.ingress()
    await cluster.ask(ingress, long_prompt(0))
    await until(cluster.agree, 2.0)
    page = ingress.gateway.metrics.exposition().decode()
    figures = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    assert float(figures["warmgate_prefix_index_blocks"]) == ingress.fleet.index.num_held("r0") > 0
    assert float(figures["warmgate_prefix_index_bytes"]) > 0
    assert float(figures['warmgate_kv_registry_exact{replica="r0"}']) == 1
    assert float(figures['warmgate_kv_registry_lag_seconds{replica="r0"}']) < 0.5
    assert float(figures["warmgate_kv_registry_heals_total"]) == 1
    assert float(figures["warmgate_kv_registry_entries_total"]) >= 1
    for _ in range(30):
        loads = await ingress.watch.loads()
        if loads["r0"].num_prefix_blocks:
            break
        await asyncio.sleep(0.1)
    assert loads["r0"].num_prefix_blocks == ingress.fleet.index.num_held("r0")
    assert loads["r0"].kv_age_s is not None and loads["r0"].kv_age_s < 1.0
