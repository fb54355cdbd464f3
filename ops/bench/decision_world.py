"""What `warmgate bench decision` decides about: an ingress's own fleet, index and router, with replicas that only push.

    64 replicas x 4M KV tokens = 4,000,000 index entries      1,000 adapters, 32 slots a replica
    conversations of 12,288 tokens: a system prompt that every replica holds, turns that one to three hold in part

Everything an ingress does for a decision is real; what replicas say is drawn once, by a fixed seed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import msgspec

from configs.schema import AdmissionConfig, Config, GroupConfig, ModelConfig, RoutingConfig, TenantConfig
from gateway.decisions import DecisionLog
from gateway.fleet import Fleet
from gateway.router import Router
from gateway.slot import DeltaSource, Link, LinkEvents, Surroundings
from gateway.types import Job, Tenant
from ops.metrics import Metrics
from replicas.contract import EngineFacts, EngineStats, GenerateRequest, SamplingParams, StepDelta
from routing.index import PrefixIndex
from routing.prefix import Namespace, block_hashes
from routing.registry import Member
from routing.waiting import merged

PROMPT_TOKENS = 12_288
SYSTEM_TOKENS = 2_048
BLOCK_TOKENS = 64
NUM_SYSTEM_PROMPTS = 8
MAX_PENDING = 50
MAX_PENDING_TOKENS = 20_000
NUM_STATES = 8
"""States each replica goes through, one a push."""

_MODEL = ModelConfig(id="m", source="sim:bytes", route_block_tokens=BLOCK_TOKENS)
_TENANT = Tenant("bench", b"salt")
_SAMPLING = SamplingParams(max_tokens=256, seed=0)
_CHUNK_BLOCKS = 8
"""Blocks of one prompt that a prefill step stores: other prompts' come between them in the index."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large the world is."""

    num_replicas: int = 64
    kv_tokens: int = 4_000_000
    num_adapters: int = 1_000
    num_slots: int = 32
    num_conversations: int = 200

    @property
    def num_blocks(self) -> int:
        """Routing blocks that one replica holds."""
        return self.kv_tokens // BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Scene:
    """The state of the fleet when it is asked. `order`: the replicas' prefill order."""

    name: str
    busy: bool
    order: str
    adapters: bool = False


class _Unheard:
    """An attempt's deltas that never come."""

    over = False

    def __anext__(self) -> Awaitable[StepDelta]:
        raise NotImplementedError("nobody reads the answer")

    def ready(self) -> list[StepDelta]:
        return []

    def listen(self, callback: Callable[[], None] | None) -> None:
        """Nothing is told."""

    def cancel(self) -> None:
        """Nothing runs."""


@dataclass(slots=True, eq=False)
class PushingLink:
    """A `gateway.slot.Link` whose replica goes through `states`, a push each."""

    replica_id: str
    facts: EngineFacts
    stats: EngineStats
    events: LinkEvents
    states: Sequence[EngineStats] = ()
    alive: bool = True
    num_opened: int = 0
    num_counted: int | None = None
    turn: int = 0
    start_id: str = ""
    _num_pushes: int = 0
    _source: DeltaSource = field(default_factory=_Unheard)

    def open(self, request: GenerateRequest) -> DeltaSource:
        self.num_opened += 1
        return self._source

    def prefetch(self, adapter_id: str) -> None:
        """The replica's states are drawn already."""

    async def close(self) -> None:
        self.alive = False

    def push(self) -> None:
        """The replica makes a step."""
        self._num_pushes += 1
        self.stats = self.states[self._num_pushes % len(self.states)]
        self.events.on_stats()


class DecisionWorld:
    """One ingress and its replicas. `start` before anything else, `close` at the end."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.index = PrefixIndex(5 * size.num_replicas * size.num_blocks // 4)
        self.now = 0.0
        self.around = Surroundings(lambda: self.now, Random(1), Metrics())
        self.links: list[PushingLink] = []
        self.plain: list[Job] = []
        self.with_adapters: list[Job] = []
        config = Config(
            models=(_MODEL,),
            groups=(GroupConfig(name="g", model="m"),),
            tenants=(TenantConfig(id="bench"),),
            admission=AdmissionConfig(max_ahead_per_replica=2 * MAX_PENDING),  # nobody is full: all are weighed
        )
        self.fleet = Fleet(config, self._connect, self.index, self.around)
        self._draw = Random(2)
        self._adapters = [f"adapter-{i}@1" for i in range(size.num_adapters)]
        self._weights = [1 / (i + 1) for i in range(size.num_adapters)]

    async def start(self) -> None:
        """Connects every replica, and fills the index with what they hold."""
        names = [f"replica-{i}" for i in range(self.size.num_replicas)]
        self.fleet.set_members({name: _member(name) for name in names})
        await self.fleet.connected()
        num = self.size.num_conversations
        self.plain = [self._job(i, None) for i in range(num)]
        adapters = self._draw.choices(self._adapters, self._weights, k=num)
        self.with_adapters = [self._job(i, adapter) for i, adapter in enumerate(adapters)]
        await asyncio.to_thread(self._fill)

    async def close(self) -> None:
        await self.fleet.close()

    def router(self, policy: str) -> Router:
        """A router over this fleet, as an ingress has one."""
        log = DecisionLog("bench", time.time)
        return Router(self.fleet, RoutingConfig(policy=policy), self.around, log)  # type: ignore[arg-type]

    def set(self, scene: Scene) -> list[Job]:
        """Makes every replica what the scene says; returns the requests to decide about, in any order."""
        draw = Random(scene.name)
        for link in self.links:
            num_adapters = self.size.num_slots if scene.adapters else 0
            link.facts = msgspec.structs.replace(link.facts, prefill_order=scene.order, max_adapters=num_adapters)
            resident = tuple({*draw.choices(self._adapters, self._weights, k=4 * num_adapters)})[:num_adapters]
            link.states = [self._stats(scene, draw, resident) for _ in range(NUM_STATES)]
            for _ in range(NUM_STATES):
                link.push()
        return self.with_adapters if scene.adapters else self.plain

    async def _connect(self, member: Member, events: LinkEvents) -> Link:
        blocks = self.size.kv_tokens // 16
        facts = EngineFacts(
            engine="bench", model="m", vocab_size=1 << 17, max_model_len=131_072, block_size=16, num_blocks=blocks,
            max_num_seqs=256, max_num_batched_tokens=2048, events=True,
        )  # fmt: skip
        self.links.append(PushingLink(member.replica_id, facts, EngineStats(), events))
        return self.links[-1]

    def _stats(self, scene: Scene, draw: Random, resident: tuple[str, ...]) -> EngineStats:
        sizes = [draw.randrange(1, MAX_PENDING_TOKENS) for _ in range(draw.randrange(MAX_PENDING + 1) * scene.busy)]
        num_blocks = self.size.kv_tokens // 16
        return EngineStats(
            num_running=draw.randrange(20, 60) * scene.busy,
            num_waiting=len(sizes),
            num_waiting_tokens=sum(sizes),
            num_free_blocks=draw.randrange(num_blocks // 4, num_blocks),
            num_blocks=num_blocks,
            prefill_tokens_per_s=draw.uniform(7000, 9000),
            step_time_s=draw.uniform(0.01, 0.03),
            waiting_sizes=merged((), sizes),
            adapters=resident,
            adapter_load_s=0.3,
        )

    def _job(self, number: int, adapter: str | None) -> Job:
        """A conversation: one of the system prompts, then turns of its own."""
        system = Random(f"system {number % NUM_SYSTEM_PROMPTS}").randbytes(4 * SYSTEM_TOKENS)
        prompt = system + self._draw.randbytes(4 * (PROMPT_TOKENS - SYSTEM_TOKENS))
        return Job(f"bench-{number}", _MODEL, _TENANT, prompt, _SAMPLING, b"salt", adapter)

    def _fill(self) -> None:
        """Every replica says what it holds: conversations in part, and other prompts up to the size of its cache."""
        held: list[list[Sequence[int]]] = [[] for _ in self.links]
        for job in (*self.plain, *self.with_adapters):
            hashes = block_hashes(job.prompt, BLOCK_TOKENS, Namespace("m", job.adapter, job.salt))
            homes = self._draw.sample(range(len(held)), min(len(held), self._draw.randrange(1, 4)))
            for replica, runs in enumerate(held):
                reach = self._draw.randrange(len(hashes) // 2, len(hashes)) if replica in homes else 0
                if reach or job.adapter is None:
                    runs.append(hashes[: max(reach, SYSTEM_TOKENS // BLOCK_TOKENS)])
        for link in self.links:
            self.index.load(link.replica_id, ())
            self.index.vouch(link.replica_id)
        stories = [self._story(link.replica_id, runs) for link, runs in zip(self.links, held, strict=True)]
        while stories:  # a chunk of each in turn, as they come from a fleet at work
            stories = [story for story in stories if next(story, None) is not None]

    def _story(self, replica_id: str, runs: list[Sequence[int]]) -> Iterator[int]:
        """Stores prompts chunk by chunk until the replica's cache is full."""
        self._draw.shuffle(runs)
        getrandbits = self._draw.getrandbits
        for hashes in runs:
            if self.index.num_held(replica_id) < self.size.num_blocks:
                yield from self._store(replica_id, hashes)
        while self.index.num_held(replica_id) < self.size.num_blocks:
            yield from self._store(replica_id, [getrandbits(64) for _ in range(PROMPT_TOKENS // BLOCK_TOKENS)])

    def _store(self, replica_id: str, hashes: Sequence[int]) -> Iterator[int]:
        for start in range(0, len(hashes), _CHUNK_BLOCKS):
            self.index.insert(replica_id, hashes[start : start + _CHUNK_BLOCKS])
            yield start


def _member(replica_id: str) -> Member:
    return Member(
        replica_id=replica_id, group="g", model="m", endpoint=f"unix:///{replica_id}", epoch=1, host_id="bench", pid=1,
        started_at=0.0,
    )  # fmt: skip
