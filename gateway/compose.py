"""The composition root of an ingress: a profile in, an ASGI app out, everything passed by hand and nothing global.

config ─► store ─► watch ─► fleet ─► router, admission ─► dispatcher ─┐
config ─► prompters, tenants, ledger, metrics ────────────────────────┴─► Gateway ─► app
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random, SystemRandom

from starlette.types import ASGIApp

from configs.runtime import Runtime
from configs.schema import Config, ModelConfig
from configs.tokenizer import load_model_files
from gateway.admission import Admission
from gateway.app import build_app
from gateway.dispatch import FleetDispatcher
from gateway.fleet import Fleet
from gateway.fleet_metrics import FleetCollector
from gateway.ledger import Ledger
from gateway.prompt import Prompter
from gateway.router import Router
from gateway.slot import Connect, Link, LinkEvents, Surroundings
from gateway.tenancy import Tenants
from gateway.types import Gateway
from ops.metrics import Metrics
from replicas.channel import HandshakeError, LinkOptions, ReplicaLink
from routing.index import PrefixIndex
from routing.registry import Member, MemberWatch
from routing.store import Store, StoreError, StoreOptions

FIRST_LINKS_S = 2.0
"""How long a start waits for replicas that are there already, so that a new ingress routes like its siblings."""


@dataclass(frozen=True, slots=True)
class ComposedGateway:
    """One ingress, whole. `start` before the first request, `close` after the last; both on the loop it was made on."""

    app: ASGIApp
    gateway: Gateway
    fleet: Fleet
    admission: Admission
    watch: MemberWatch
    store: Store

    async def start(self) -> None:
        """Begins to watch and connect; returns soon, replicas or not. Raises OSError for a usage log it cannot open."""
        self.gateway.ledger.start()
        self.fleet.subscribe(self.admission.pump)
        self.watch.subscribe(self.fleet.set_members)
        with contextlib.suppress(StoreError):  # the watch goes on trying
            await self.watch.refresh()
        self.watch.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LINKS_S):
                await self.fleet.connected()

    def check_health(self) -> None:
        """Raises RuntimeError when this process should be replaced: it answers nobody any more."""
        if self.fleet.closed:
            raise RuntimeError("the ingress is closed")

    async def close(self) -> None:
        """Refuses who waits, drops every link, writes the books. Idempotent."""
        await self.watch.close()
        self.admission.close()
        await self.fleet.close()
        await self.gateway.ledger.close()
        await self.store.close()


async def compose(config: Config, runtime: Runtime, random: Random | None = None) -> ComposedGateway:
    """Builds an ingress on the running event loop; nothing runs before `start`.

    Raises ConfigError for model files that are missing or unreadable.
    """
    random = random or SystemRandom()
    around = Surroundings(asyncio.get_running_loop().time, random, Metrics())
    ingress_id = f"wg{random.getrandbits(32):08x}"
    store = Store(runtime.redis_url, config.cluster, StoreOptions(timeout_s=config.redis.timeout_s))
    index = PrefixIndex(config.routing.max_index_blocks)
    fleet = Fleet(config, channel_connect(config, runtime.secret, ingress_id), index, around)
    around.metrics.registry.register(FleetCollector(fleet))
    admission = Admission(config.admission, fleet, around.clock, around.metrics)
    router = Router(fleet, config.routing, around)
    usage_log = config.telemetry.usage_log
    gateway = Gateway(
        config=config,
        dispatcher=FleetDispatcher(fleet, admission, router, around),
        prompters={model.id: await _prompter(model, runtime.home, around.metrics) for model in config.models},
        tenants=Tenants(config.tenants, runtime.secret, around.clock),
        ledger=Ledger(around.metrics, None if usage_log is None else Path(usage_log)),
        metrics=around.metrics,
        ingress_id=ingress_id,
        clock=around.clock,
        random=random,
    )
    return ComposedGateway(
        build_app(gateway), gateway, fleet, admission, MemberWatch(store, reachable=fleet.is_linked), store
    )


async def serve_gateway(config: Config, runtime: Runtime) -> ComposedGateway:
    """Composes and starts an ingress."""
    composed = await compose(config, runtime)
    await composed.start()
    return composed


def channel_connect(config: Config, secret: bytes, ingress_id: str) -> Connect:
    """How a fleet connects over the real channel."""

    async def connect(member: Member, events: LinkEvents) -> Link:
        options = LinkOptions(
            heartbeat_s=config.channel.heartbeat_s,
            dead_after_s=config.channel.dead_after_s,
            on_stats=lambda link: events.on_stats(),
            on_lost=lambda link: events.on_lost(),
        )
        link = await ReplicaLink.connect(member.endpoint, secret, ingress_id, options)
        if link.replica_id != member.replica_id:  # a socket path or port that somebody else has by now
            await link.close()
            raise HandshakeError(f"{member.endpoint} is {link.replica_id}, not {member.replica_id}")
        return link

    return connect


async def _prompter(model: ModelConfig, home: Path, metrics: Metrics) -> Prompter:
    """Reads a model's tokenizer off the event loop: tens of megabytes of JSON for some."""
    files = await asyncio.to_thread(load_model_files, model.source, home)
    observe: Callable[[str, int], None] = partial(_count_chars, metrics)
    return await asyncio.to_thread(Prompter, files, observe=observe)


def _count_chars(metrics: Metrics, source: str, num_chars: int) -> None:
    metrics.prompt_cache.labels(source).inc(num_chars)
