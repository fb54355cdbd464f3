"""Ingresses and replicas in one process over one Valkey: what the tests of the KV registry's wiring drive."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from configs.runtime import Runtime
from configs.schema import ChannelConfig, Config, EngineConfig, GroupConfig, ModelConfig, SimConfig, TenantConfig
from configs.tokenizer import ModelFiles
from gateway.compose import ComposedGateway, compose
from gateway.tenancy import tenant_salt
from replicas.contract import Engine, cache_namespace, pack_tokens
from replicas.engine.block_pool import BlockPool
from replicas.engine.loop import BuiltEngine, ThreadedEngine
from replicas.host import EngineBuilder, HostOptions, ReplicaHost
from replicas.sim_engine import SimOptions, build_sim
from replicas.sim_model import SimModel
from routing.prefix import Namespace, block_hashes
from tests.routing.conftest import Valkey

BLOCK_TOKENS = 32
A_SECOND = 2.0
"""What takes under a second takes no longer than this beside other work on the same cores."""
ENGINE = EngineConfig(kind="sim", max_num_seqs=8, sim=SimConfig(step_base_s=0.002, num_blocks=256))
CONFIG = Config(
    cluster="test",
    models=(ModelConfig(id="m", source="sim:bytes", default_max_tokens=2, route_block_tokens=BLOCK_TOKENS),),
    groups=(GroupConfig(name="g", model="m", engine=ENGINE),),
    tenants=(TenantConfig(id="local", anonymous=True),),
    channel=ChannelConfig(heartbeat_s=0.2, dead_after_s=2.0),
)


class Cluster:
    """Replicas and ingresses in this process; every ingress is asked over its ASGI app."""

    def __init__(self, valkey: Valkey) -> None:
        folder = valkey.path.parent
        self.valkey = valkey
        self.runtime = Runtime(folder, folder, valkey.url, b"s" * 32, "test")
        self.hosts: list[ReplicaHost] = []
        self.ingresses: list[ComposedGateway] = []
        self.pools: dict[str, BlockPool] = {}
        self._clients: dict[int, httpx.AsyncClient] = {}
        self._num_asked: Counter[int] = Counter()

    async def host(self, clock: Callable[[], float] = time.time, replica_id: str | None = None) -> ReplicaHost:
        """A replica more, or one that starts anew in the place of `replica_id`."""
        name = replica_id or f"r{len(self.hosts)}"
        options = HostOptions(build=self._builder(name), wall_clock=clock)
        host = ReplicaHost(CONFIG, CONFIG.groups[0], self.runtime, name, options)
        await host.start()
        self.hosts.append(host)
        return host

    def _builder(self, replica_id: str) -> EngineBuilder:
        """Builds sim engines, and keeps their block pools to see what is really in them."""

        def build(files: ModelFiles, config: EngineConfig, model_id: str) -> Engine:
            options = SimOptions()
            model = SimModel(files.vocab_size, files.special.eos, options.alphabet, config.sim.mean_output_tokens)

            def built() -> BuiltEngine:
                made = build_sim(config, model, model_id, options)
                self.pools[replica_id] = made.core.scheduler.pool
                return made

            return ThreadedEngine(built, options.clock)

        return build

    def really_held(self, replica_id: str, prompt: str) -> int:
        """Leading routing blocks of a prompt of tenant `local` that are in the replica's cache."""
        namespace = cache_namespace(None, tenant_salt(self.runtime.secret, "local"))
        found = self.pools[replica_id].match(namespace, array("I", list(prompt.encode())))
        return len(found) * self.pools[replica_id].block_size // BLOCK_TOKENS

    def hashes(self, prompt: str) -> tuple[int, ...]:
        """The prompt as routing asks for it."""
        namespace = Namespace("m", None, tenant_salt(self.runtime.secret, "local"))
        return block_hashes(pack_tokens(list(prompt.encode())), BLOCK_TOKENS, namespace)

    async def ingress(self) -> ComposedGateway:
        """An ingress more, among `ingresses` once it has started and knows the replicas and what they hold."""
        composed = await compose(CONFIG, self.runtime)
        try:
            await composed.start()  # which does not wait for a Redis that hesitates
            fleet = composed.fleet
            await until(lambda: fleet.num_ready("m") == len(self.hosts) and not fleet.index.guessed, 10.0)
        except BaseException:
            await composed.close()
            raise
        transport = httpx.ASGITransport(app=composed.app)
        self._clients[id(composed)] = httpx.AsyncClient(transport=transport, base_url="http://ingress")
        self.ingresses.append(composed)
        return composed

    async def ask(self, ingress: ComposedGateway, prompt: str) -> dict[str, Any]:
        """One completion; the answer, with `replica` in it."""
        body = {"model": "m", "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
        self._num_asked[id(ingress)] += 1
        try:
            answer = await self._clients[id(ingress)].post("/v1/completions", json=body)
        finally:
            self._num_asked[id(ingress)] -= 1
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

    async def leave(self, ingress: ComposedGateway) -> None:
        """One ingress stops, as Ray stops one: nothing new comes, what is there ends, then it closes."""
        self.ingresses.remove(ingress)
        await until(lambda: not self._num_asked[id(ingress)], 10.0)
        await self._clients.pop(id(ingress)).aclose()
        await ingress.close()

    async def close(self) -> None:
        for client in self._clients.values():
            await client.aclose()
        for ingress in self.ingresses:
            await ingress.close()
        for host in self.hosts:
            await host.close()


async def until(holds: Callable[[], bool], seconds: float) -> float:
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


def long_prompt(number: int) -> str:
    return f"{number:04d} " * 60  # ten routing blocks
