"""The composition root of an ingress: a profile in, an ASGI app out, everything passed by hand and nothing global.

config ─► store ─► watch ─► fleet ─► router, admission ─► dispatcher ─┐
              └─► KV registry ─► index ─┘                              │
config ─► prompters, tenants, ledger, metrics ────────────────────────┴─► Gateway ─► app
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from random import Random, SystemRandom

from starlette.types import ASGIApp

from configs.adapters.files import AdapterFiles, fit_for
from configs.check import num_slots
from configs.grammars.guard import GrammarGuard
from configs.runtime import Runtime
from configs.schema import Config, EngineConfig, ModelConfig
from configs.tokenizer import load_model_files
from gateway.adapter_admin import AdapterAdmin, Trial
from gateway.adapter_metrics import SourcesCollector
from gateway.adapter_sources import AdapterSources, SourceTools
from gateway.admission import Admission
from gateway.app import build_app
from gateway.decisions import DecisionLog
from gateway.dispatch import FleetDispatcher
from gateway.explain import Explainer
from gateway.fleet import Fleet
from gateway.fleet_metrics import FleetCollector
from gateway.fleet_shares import FleetShares
from gateway.grammar_check import GrammarCheck
from gateway.ledger import Ledger
from gateway.matching import matching
from gateway.prompt import Prompter
from gateway.registry_metrics import RegistryCollector
from gateway.router import Router
from gateway.slot import Connect, Link, LinkEvents, Surroundings
from gateway.tenancy import Tenants, tenant_salt
from gateway.types import Gateway, Tenant
from ops.metrics import Metrics
from replicas.channel import HandshakeError, LinkOptions, ReplicaLink
from routing.adapter_sources import SourceBoard
from routing.adapter_watch import AdapterWatch
from routing.adapters import AdapterRegistry, declared
from routing.index import PrefixIndex
from routing.kv_follow import KvSource
from routing.kv_registry import KvRegistry, KvRegistryOptions
from routing.lease import Lease
from routing.questions import Questions
from routing.registry import Member, MemberWatch
from routing.shared_counts import SharedCounts
from routing.store import Store, StoreError, StoreOptions

SOURCES = "adapter-sources"
"""In whose name adapters of sources are tried."""

FIRST_LINKS_S = 2.0
"""How long a start waits for replicas that are there already, so that a new ingress routes like its siblings."""

FIRST_KV_S = 1.0
"""How long it then waits for what those replicas hold."""

MAX_WORD_S = 1.5
"""Age at which a replica's word about its cache counts no more: its heartbeat, and what the stream may lag behind. With
the periods of looking it stays below two seconds."""

MIN_LATE_S = 0.6
"""A stream that lags less than this is in order: publishing and reading, eight times a second each, and
a busy moment take as long."""


@dataclass(frozen=True, slots=True)
class ComposedGateway:
    """One ingress, whole. `start` before the first request, `close` after the last; both on the loop it was made on."""

    app: ASGIApp
    gateway: Gateway
    fleet: Fleet
    admission: Admission
    watch: MemberWatch
    store: Store
    kv_registry: KvRegistry
    adapters: AdapterWatch
    questions: Questions
    grammars: GrammarCheck
    counts: SharedCounts
    sources: AdapterSources

    async def start(self) -> None:
        """Begins to watch and connect; returns soon, replicas or not. Raises OSError for a usage log it cannot open."""
        self.gateway.ledger.start()
        self.fleet.subscribe(self.admission.pump)
        self.watch.subscribe(self.fleet.set_members)
        with contextlib.suppress(StoreError):  # the watch goes on trying
            await self.watch.refresh()
        self.watch.start()
        with contextlib.suppress(StoreError):
            await self.adapters.refresh()
        self.adapters.start()
        self.questions.start()
        self.counts.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LINKS_S):
                await self.fleet.connected()
        self.kv_registry.look()
        self.kv_registry.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_KV_S):
                await self.kv_registry.caught_up()
        self.sources.start()

    def check_health(self) -> None:
        """Raises RuntimeError when this process should be replaced: it answers nobody any more."""
        if self.fleet.closed:
            raise RuntimeError("the ingress is closed")

    async def close(self) -> None:
        """Refuses who waits, drops every link, writes the books. Idempotent."""
        await self.sources.close()
        await self.watch.close()
        await self.adapters.close()
        await self.questions.close()
        await self.counts.close()
        await self.kv_registry.close()
        self.admission.close()
        await self.fleet.close()
        self.grammars.close()
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
    kv_registry = KvRegistry(store, index, lambda: kv_sources(config, fleet), _kv_options(config, around))
    around.metrics.registry.register(RegistryCollector(kv_registry, index))
    adapters = AdapterWatch(store, declared(config.adapters))
    log = DecisionLog(ingress_id, time.time)
    router = Router(fleet, config.routing, around, log)
    admission = Admission(config.admission, fleet, around, matching(config, router))
    explainer = Explainer(log, lambda to, question: questions.ask(to, question))
    questions = Questions(store, ingress_id, random, explainer.answer)
    grammars = GrammarCheck(GrammarGuard())
    tenants = Tenants(config.tenants, runtime.secret, around.clock)
    counts = SharedCounts(store, ingress_id, runtime.secret)
    FleetShares(counts, admission, tenants)
    usage_log = config.telemetry.usage_log
    dispatcher = FleetDispatcher(fleet, admission, router, around)
    prompters = {model.id: await _prompter(model, runtime.home, around.metrics) for model in config.models}
    trial = Trial(
        dispatcher,
        prompters.__getitem__,
        around.clock,
        fleet.states,
        AdapterFiles(config, runtime.home),
        {model.id: fit_for(model, _engines(config, model), runtime.home) for model in config.models},
    )
    admin = AdapterAdmin(config, AdapterRegistry(store), adapters, trial)
    sources = AdapterSources(
        config.adapter_sources, _source_tools(admin, adapters, store, (ingress_id, runtime.secret))
    )
    if config.adapter_sources:
        around.metrics.registry.register(SourcesCollector(sources, lambda: adapters.catalogue))
    gateway = Gateway(
        config=config,
        dispatcher=dispatcher,
        prompters=prompters,
        tenants=tenants,
        ledger=Ledger(around.metrics, None if usage_log is None else Path(usage_log)),
        metrics=around.metrics,
        ingress_id=ingress_id,
        clock=around.clock,
        random=random,
        catalogue=lambda: adapters.catalogue,
        explainer=explainer,
        adapters=admin,
        check_grammar=grammars,
    )
    return ComposedGateway(
        build_app(gateway),
        gateway,
        fleet,
        admission,
        MemberWatch(store, connected=fleet.start_linked),
        store,
        kv_registry,
        adapters,
        questions,
        grammars,
        counts,
        sources,
    )


async def serve_gateway(config: Config, runtime: Runtime) -> ComposedGateway:
    """Composes and starts an ingress."""
    composed = await compose(config, runtime)
    await composed.start()
    return composed


def _engines(config: Config, model: ModelConfig) -> list[EngineConfig]:
    """Those that take adapters of a model."""
    return [group.engine for group in config.groups if group.model == model.id and num_slots(group.engine)]


def _source_tools(admin: AdapterAdmin, watch: AdapterWatch, store: Store, own: tuple[str, bytes]) -> SourceTools:
    """`own`: this ingress's id, and the cluster's secret."""
    ingress_id, secret = own
    numbers = count()
    return SourceTools(
        admin=admin,
        watch=watch,
        board=SourceBoard(store),
        lease=Lease(store, "adapter-sources", ingress_id),
        tenant=Tenant(SOURCES, tenant_salt(secret, SOURCES)),
        draw=lambda: f"{ingress_id}-source-{next(numbers)}",
    )


def kv_sources(config: Config, fleet: Fleet) -> Iterator[KvSource]:
    """The connected replicas that publish what they hold; not one whose last word, which says where, was of another
    start than the one that the link leads to."""
    for member, link in fleet.links():
        model = config.model_named(member.model)
        if model is not None and link.facts.events and link.start_id == member.start_id:
            kv_seq = link.stats.kv_seq
            yield KvSource(member.replica_id, member.epoch, model.route_block_tokens, kv_seq, member.start_id)


def _kv_options(config: Config, around: Surroundings) -> KvRegistryOptions:
    late_s = max(MIN_LATE_S, MAX_WORD_S - config.channel.heartbeat_s)
    return KvRegistryOptions(late_s=late_s, clock=around.clock)


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
