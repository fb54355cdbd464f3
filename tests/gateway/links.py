"""Replicas whose every word is the test's: what a fleet sees of the channel, without a wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from random import Random

import msgspec

from configs.schema import AdmissionConfig, Config, GroupConfig, ModelConfig, RoutingConfig, TenantConfig
from gateway.admission import Admission
from gateway.decisions import DecisionLog
from gateway.dispatch import FleetDispatcher
from gateway.fleet import Fleet
from gateway.matching import matching
from gateway.router import Router
from gateway.slot import Link, LinkEvents, Surroundings
from gateway.types import Job, Tenant
from ops.metrics import Metrics
from replicas.channel import EndpointError, LinkLostError
from replicas.contract import EngineFacts, EngineStats, Fault, GenerateRequest, SamplingParams, StepDelta, pack_tokens
from routing.index import PrefixIndex
from routing.registry import Member

MODEL = ModelConfig(id="m", source="sim:bytes", route_block_tokens=16)
OTHER = ModelConfig(id="other", source="sim:bytes")
FACTS = EngineFacts(
    engine="scripted", model="m", vocab_size=300, max_model_len=512, block_size=16, num_blocks=256, max_num_seqs=4,
    max_num_batched_tokens=128,
)  # fmt: skip
STATS = EngineStats(num_free_blocks=256, num_blocks=256, prefill_tokens_per_s=1000.0, step_time_s=0.01)


def member(replica_id: str, model: str = "m", epoch: int = 1) -> Member:
    return Member(
        replica_id=replica_id, group="g", model=model, endpoint=f"unix:///{replica_id}", epoch=epoch, host_id="h",
        pid=1, started_at=0.0, start_id=f"{replica_id}-{epoch}",
    )  # fmt: skip


class ScriptedSource(AsyncIterator[StepDelta]):
    """One attempt. `say` and `fault` are the replica speaking."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.cancelled = False
        self._words: asyncio.Queue[StepDelta | Exception] = asyncio.Queue()
        self._over = False
        self._callback: Callable[[], None] | None = None

    def ready(self) -> list[StepDelta]:
        deltas: list[StepDelta] = []
        while not self._words.empty():
            word = self._words.get_nowait()
            if isinstance(word, StepDelta):
                deltas.append(word)
            elif deltas:
                self._words.put_nowait(word)  # nothing comes after an error
                break
            else:
                raise word
        return deltas

    @property
    def over(self) -> bool:
        return self._over

    def listen(self, callback: Callable[[], None] | None) -> None:
        self._callback = callback

    def _put(self, word: StepDelta | Exception) -> None:
        self._words.put_nowait(word)
        if self._callback is not None:
            self._callback()

    async def __anext__(self) -> StepDelta:
        word = await self._words.get()
        if isinstance(word, Exception):
            raise word
        return word

    def cancel(self) -> None:
        self.cancelled = not self._over

    def say(self, *token_ids: int, finish: str | None = None, cached: int | None = None) -> None:
        self._over = finish is not None
        delta = StepDelta(self.request.request_id, self.request.attempt, token_ids, finish_reason=finish)  # type: ignore[arg-type]
        delta.num_cached_tokens = cached
        self._put(delta)

    def fault(self, code: str, *, retryable: bool = False) -> None:
        self._over = True
        fault = Fault(code, f"the replica says {code}", retryable)
        delta = StepDelta(self.request.request_id, self.request.attempt, finish_reason="error", fault=fault)
        self._put(delta)

    def lose(self, replica_id: str) -> None:
        self._over = True
        self._put(LinkLostError(replica_id, "scripted"))


class ScriptedLink:
    """A connection to a scripted replica."""

    def __init__(self, replica_id: str, events: LinkEvents, facts: EngineFacts, start_id: str = "") -> None:
        self.replica_id = replica_id
        self.start_id = start_id
        self.facts = facts
        self.stats = STATS
        self.num_opened = 0
        self.num_counted: int | None = None
        self.turn = 0
        self.alive = True
        self.closed = False
        self.sources: list[ScriptedSource] = []
        self.prefetched: list[str] = []
        self._events = events

    def open(self, request: GenerateRequest) -> ScriptedSource:
        if not self.alive:
            raise LinkLostError(self.replica_id, "scripted")
        self.num_opened += 1
        self.sources.append(ScriptedSource(request))
        return self.sources[-1]

    def prefetch(self, adapter_id: str) -> None:
        self.prefetched.append(adapter_id)

    async def close(self) -> None:
        self.closed, self.alive = True, False

    def push(self, **stats: object) -> None:
        """The replica pushes its state."""
        self.stats = msgspec.structs.replace(self.stats, **stats)
        self._events.on_stats()

    def lose(self) -> None:
        """The replica is killed."""
        self.alive = False
        for source in self.sources:
            source.lose(self.replica_id)
        self._events.on_lost()


class World:
    """A fleet of scripted replicas with admission, router and dispatcher, all of them real."""

    def __init__(self, policy: str = "warm", **limits: object) -> None:
        self.now = 0.0
        self.config = Config(
            models=(MODEL, OTHER),
            groups=(GroupConfig(name="g", model="m"),),
            tenants=(TenantConfig(id="t", anonymous=True),),
            admission=AdmissionConfig(**limits),  # type: ignore[arg-type]
            routing=RoutingConfig(policy=policy),  # type: ignore[arg-type]
        )
        self.metrics = Metrics()
        around = Surroundings(self.clock, Random(1), self.metrics)
        self.links: dict[str, ScriptedLink] = {}
        self.facts: dict[str, EngineFacts] = {}
        self.starts: dict[str, str] = {}  # who is really there, if not who was announced
        self.unreachable: set[str] = set()
        self.num_connects = 0
        self.fleet = Fleet(self.config, self._connect, PrefixIndex(10_000), around)
        self.router = Router(self.fleet, self.config.routing, around, DecisionLog("wg", self.clock))
        self.admission = Admission(self.config.admission, self.fleet, around, matching(self.config, self.router))
        self.fleet.subscribe(self.admission.pump)
        self.dispatcher = FleetDispatcher(self.fleet, self.admission, self.router, around)

    def clock(self) -> float:
        return self.now

    async def _connect(self, member: Member, events: LinkEvents) -> Link:
        self.num_connects += 1
        if member.replica_id in self.unreachable:
            raise EndpointError(f"{member.replica_id} is unreachable")
        facts = self.facts.get(member.replica_id, FACTS)
        start_id = self.starts.get(member.replica_id, member.start_id)
        self.links[member.replica_id] = ScriptedLink(member.replica_id, events, facts, start_id)
        return self.links[member.replica_id]

    async def members(self, *members: Member) -> None:
        self.fleet.set_members({m.replica_id: m for m in members})
        await settle()

    async def replicas(self, *replica_ids: str) -> list[ScriptedLink]:
        await self.members(*map(member, replica_ids))
        return [self.links[replica_id] for replica_id in replica_ids]

    async def close(self) -> None:
        """Ends it, and sees that nothing was leaked."""
        assert self.admission.num_waiting == 0
        assert self.admission.num_unplaced == 0
        self.admission.check()
        self.admission.close()
        await self.fleet.close()


async def settle() -> None:
    """Lets everything that can run, run."""
    for _ in range(20):
        await asyncio.sleep(0)


def job(request_id: str = "r", num_tokens: int = 64, **changes: object) -> Job:
    return Job(
        request_id=request_id,
        model=MODEL,
        tenant=Tenant("t", b"salt"),
        prompt=pack_tokens(range(num_tokens)),
        sampling=SamplingParams(max_tokens=20, seed=0),
        salt=b"salt",
        **changes,  # type: ignore[arg-type]
    )
