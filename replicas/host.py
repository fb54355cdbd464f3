"""A replica, whole: engine with text, channel server, membership. What a Serve actor, or a test, runs.

start   load ─► listen ─► join, once Redis answers        drain   withdraw ─► refuse, let the running ones end
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import msgspec

from configs.adapters.files import AdapterFiles, fit_for
from configs.catalogue import model_dir
from configs.runtime import MAX_SOCKET_NAME, Runtime
from configs.schema import Config, EngineConfig, GroupConfig, ModelConfig
from configs.tokenizer import ModelFiles, load_model_files
from replicas.adapter_files import CheckedLoads, Loads
from replicas.adapter_source import CatalogueSource
from replicas.adapters import AdapterEngine, AdapterOptions
from replicas.channel import ChannelServer, JsonLinesJournal, ServerOptions
from replicas.contract import Engine, EngineDeadError, EngineError, EngineFacts
from replicas.detokenize import TextEngine
from replicas.kv_blocks import BlocksOptions, RouteBlocks
from replicas.kv_publisher import KvPlace, KvPublisher
from routing.adapter_watch import AdapterWatch
from routing.adapters import declared
from routing.epochs import next_epoch
from routing.registry import Announcement, Load, Member
from routing.store import Store, StoreError, StoreOptions

log = logging.getLogger(__name__)

EngineBuilder: TypeAlias = Callable[[ModelFiles, EngineConfig, str], Engine]
"""(files, config, model id) → an engine without text, not yet started. Runs outside the event loop."""


def _native(files: ModelFiles, config: EngineConfig, model_id: str) -> Engine:
    from replicas.engine.engine import native_engine  # torch, which a sim replica does without

    if files.path is None:
        raise EngineError(f"model {model_id} has no weights: the native engine cannot run it, the sim engine can")
    return native_engine(files.path, config, model_id)


def _sim(files: ModelFiles, config: EngineConfig, model_id: str) -> Engine:
    from replicas.sim_engine import SimOptions, sim_engine

    options = SimOptions(tokenizer_json=files.tokenizer.to_str())
    return sim_engine(config, files.vocab_size, files.special.eos, model_id, options)


def _vllm(files: ModelFiles, config: EngineConfig, model_id: str) -> Engine:
    from replicas.vllm.versions import check_installed

    if files.path is None:
        raise EngineError(f"model {model_id} has no weights: vLLM cannot run it, the sim engine can")
    check_installed()
    from replicas.vllm.launch import Wanted
    from replicas.vllm_engine import VllmEngine

    return VllmEngine(Wanted(files.path, config, model_id))


def _openai(files: ModelFiles, config: EngineConfig, model_id: str) -> Engine:
    from replicas.foreign.server import Upstream
    from replicas.openai_engine import OpenAiEngine

    return OpenAiEngine(Upstream(config, files, model_id))


_BUILDERS: dict[str, EngineBuilder] = {"native": _native, "vllm": _vllm, "openai": _openai, "sim": _sim}
_WRITES_TEXT = ("openai",)
"""Engines whose answers are text already."""


def build_engine(files: ModelFiles, config: EngineConfig, model_id: str) -> Engine:
    """The engine of `config.kind`. Raises EngineError when it cannot run this model."""
    return _BUILDERS[config.kind](files, config, model_id)


JOIN_S = 0.5
"""How often a replica tries to join while Redis is away; so long a start waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOptions:
    """`wall_clock`: Unix seconds, for the journal and the epoch."""

    build: EngineBuilder = build_engine
    wall_clock: Callable[[], float] = time.time


class ReplicaHost:
    """One replica of `group`. `start` once; then `drain` (optional) and `close`.

    It listens on a Unix socket in `runtime.run_dir`, and appends the usage of requests whose ingress vanished to
    `journal-{replica_id}.jsonl` there, or to `{telemetry.usage_log}.replicas` where the profile keeps usage.
    """

    def __init__(
        self, config: Config, group: GroupConfig, runtime: Runtime, replica_id: str, options: HostOptions | None = None
    ) -> None:
        self.replica_id = replica_id
        self.endpoint = f"unix://{runtime.run_dir / socket_name(replica_id)}"
        self._config = config
        self._group = group
        self._runtime = runtime
        self._options = options or HostOptions()
        self._store = Store(runtime.redis_url, config.cluster, StoreOptions(timeout_s=config.redis.timeout_s))
        self._server: ChannelServer | None = None
        self._joining: asyncio.Task[None] | None = None
        self._announcement: Announcement | None = None
        self._publisher: KvPublisher | None = None
        self._catalogue = AdapterWatch(self._store, declared(config.adapters))
        self._started_at = 0.0

    async def start(self) -> EngineFacts:
        """Loads, listens, announces; while Redis cannot be asked, the last is yet to come.

        Raises ConfigError (model files), EngineError, EndpointError; then nothing is left running.
        """
        try:
            adapters, engine = await asyncio.to_thread(self._load)
            options = self._server_options(adapters)
            server = self._server = ChannelServer(engine, self.replica_id, self._runtime.secret, options)
            adapters.on_change = server.announce
            self._catalogue.on_change = adapters.drop_outdated
            facts = await server.start([self.endpoint])
            self._started_at = self._options.wall_clock()
            if facts.max_adapters:
                await self._fetch_pinned(adapters)
                self._catalogue.start()
            if facts.events:
                self._publisher = self._publish(engine, facts)
            self._joining = asyncio.create_task(self._join(facts), name=f"join as {self.replica_id}")
            await asyncio.wait([self._joining], timeout=JOIN_S)  # while Redis is away, it goes on trying
        except BaseException:
            await self.close()
            raise
        return facts

    async def _join(self, facts: EngineFacts) -> None:
        """Speaks to the ingresses, from when Redis has told what earlier starts left there: only then is this one's
        epoch sure to be later."""
        epoch, tell = None, log.warning
        while epoch is None:
            try:
                epoch = await next_epoch(self._store, self.replica_id, self._started_at)
            except StoreError as error:
                tell("%s cannot announce itself yet: %s", self.replica_id, error)
                tell = log.debug
                await self._store.beat(JOIN_S)
            except Exception:  # our bug, but it may pass, and unannounced this replica is of no use
                log.exception("%s cannot announce itself yet", self.replica_id)
                await self._store.beat(JOIN_S)
        if self._publisher is not None:
            self._publisher.begin(epoch)
        self._announcement = Announcement(self._store, self._member(facts, epoch), self._load_now)
        self._announcement.start()

    async def _fetch_pinned(self, adapters: AdapterEngine) -> None:
        """Begins to load what is to be kept anyway."""
        with contextlib.suppress(StoreError):
            await self._catalogue.refresh()
        for adapter in self._catalogue.catalogue.current():
            if adapter.pinned and adapter.base_model == self._group.model:
                adapters.prefetch(adapter.adapter_id)

    async def check_health(self) -> None:
        """Raises EngineDeadError when this process should be replaced; it then takes itself out of the membership."""
        if self._server is None:
            raise EngineDeadError(f"replica {self.replica_id} is not running")
        self._server.stats()  # a dead engine says so here
        if self._server.fault is not None:
            await self._withdraw()
            raise EngineDeadError(f"replica {self.replica_id}: {self._server.fault.message}")

    async def drain(self) -> None:
        """Leaves the membership, refuses new requests (`draining`, retryable), returns when the running ones have
        ended. The caller bounds it in time; cancelling it is safe."""
        await self._withdraw()
        if self._server is not None:
            await self._server.drain()

    async def close(self) -> None:
        """Stops at once: open requests end with `engine_dead`. Idempotent."""
        await self._withdraw()
        if self._publisher is not None:
            await self._publisher.close()
        await self._catalogue.close()
        try:
            if self._server is not None:
                await self._server.close()
        finally:
            self._server = None
            await self._store.close()

    async def _withdraw(self) -> None:
        if self._joining is not None:
            self._joining.cancel()
            await asyncio.wait([self._joining])
        if self._announcement is not None:
            await self._announcement.withdraw()

    def _load(self) -> tuple[AdapterEngine, Engine]:
        """The engine, with its adapters, and with text around both where it has none."""
        model = self._config.model_named(self._group.model)
        if model is None:
            raise EngineError(f"group {self._group.name} serves model {self._group.model}, which the profile lacks")
        files = load_model_files(model.source, self._runtime.home)
        engine = self._group.engine
        options = AdapterOptions(
            max_loads=engine.max_adapter_loads, max_waiting=engine.max_waiting, around=self._around(model)
        )
        built = self._options.build(files, _located(engine, self._runtime.home), model.id)
        adapters = AdapterEngine(built, CatalogueSource(self._catalogue), options)
        return adapters, adapters if engine.kind in _WRITES_TEXT else TextEngine(adapters, files.tokenizer)

    def _around(self, model: ModelConfig) -> Callable[[Loads], Loads]:
        """What looks at an adapter's files before the engine does; the sim engine's have none."""
        if self._group.engine.kind == "sim":
            return lambda engine: engine
        files = AdapterFiles(self._config, self._runtime.home)
        fit = fit_for(model, [self._group.engine], self._runtime.home)
        return lambda engine: CheckedLoads(engine, files, fit)

    def _server_options(self, adapters: AdapterEngine) -> ServerOptions:
        channel = self._config.channel
        usage_log = self._config.telemetry.usage_log
        path = self._runtime.run_dir / f"journal-{self.replica_id}.jsonl"
        if usage_log is not None:  # beside the ingresses' records, and not in a folder that goes with the instance
            path = Path(f"{usage_log}.replicas")
        return ServerOptions(
            heartbeat_s=channel.heartbeat_s,
            dead_after_s=channel.dead_after_s,
            round_trip_s=channel.round_trip_s,
            prefetch=adapters.prefetch,
            journal=JsonLinesJournal(path, self._options.wall_clock),
        )

    def _load_now(self) -> Load:
        assert self._server is not None, "announced while it runs"
        stats = self._server.stats()
        return Load(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_waiting_tokens=stats.num_waiting_tokens,
            num_free_blocks=stats.num_free_blocks,
            num_blocks=stats.num_blocks,
            num_output_tokens=stats.num_output_tokens,
            draining=stats.draining,
            num_prefix_blocks=0 if self._publisher is None else len(self._publisher.blocks.held),
            kv_age_s=None if self._publisher is None else self._publisher.age_s,
        )

    def _publish(self, engine: Engine, facts: EngineFacts) -> KvPublisher:
        """Begins to follow what is in the prefix cache, to tell the ingresses."""
        model = self._config.model_named(self._group.model)
        assert model is not None, "_load has looked"
        blocks = RouteBlocks(BlocksOptions(model.id, model.route_block_tokens, 2 * facts.num_blocks))
        place = KvPlace(self.replica_id, model.route_block_tokens)
        publisher = KvPublisher(self._store, blocks, engine.kv_events, place)
        publisher.start()
        return publisher

    def _member(self, facts: EngineFacts, epoch: int) -> Member:
        model = self._config.model_named(self._group.model)
        assert model is not None and self._server is not None, "_load has looked"
        return Member(
            replica_id=self.replica_id,
            group=self._group.name,
            model=model.id,
            endpoint=self.endpoint,
            epoch=epoch,
            host_id=socket.gethostname(),
            pid=os.getpid(),
            started_at=self._started_at,
            engine=facts.engine,
            start_id=self._server.start_id,
        )


def _located(config: EngineConfig, home: Path) -> EngineConfig:
    """The profile's settings with the folder of the model that guesses, where there is one."""
    guessing = config.speculative
    if guessing is None or guessing.model is None:
        return config
    located = msgspec.structs.replace(guessing, model=str(model_dir(guessing.model, home)))
    return msgspec.structs.replace(config, speculative=located)


def socket_name(replica_id: str) -> str:
    """`{replica_id}.sock`, or a digest of the id where that would make the path of a Unix socket too long."""
    name = f"{replica_id}.sock"
    if len(os.fsencode(name)) <= MAX_SOCKET_NAME:
        return name
    return f"{hashlib.sha256(replica_id.encode()).hexdigest()[:24]}.sock"
