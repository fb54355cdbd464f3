"""One replica as an ingress sees it: what it last said, and what was sent to it since."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from gateway.asked import AskedAdapters
from gateway.breaker import Breaker
from ops.metrics import Metrics
from replicas.channel import LinkLostError
from replicas.contract import EngineFacts, EngineStats, GenerateRequest, StepDelta
from routing.registry import Member
from routing.types import ReplicaState
from routing.waiting import NOBODY, SHORTEST, Pending, merged, pending_of

MIN_PUSHES = 2
MIN_SENT_S = 0.01
"""Where a replica does not say itself, a request is in its pushed state after this many pushes and seconds: the first
one may have crossed it on the wire, and several may have lain in the socket."""

STEPS_TO_LEARN = 12
"""A replica's rates are means that decay by a tenth a step: after so many they are mostly new."""


class DeltaSource(Protocol):
    """One attempt at a replica (`replicas.channel.DeltaStream`)."""

    def __anext__(self) -> Awaitable[StepDelta]: ...

    def ready(self) -> list[StepDelta]: ...

    @property
    def over(self) -> bool: ...

    def listen(self, callback: Callable[[], None] | None) -> None: ...

    def cancel(self) -> None: ...


class Link(Protocol):
    """A connection to a replica (`replicas.channel.ReplicaLink`)."""

    @property
    def replica_id(self) -> str: ...

    @property
    def start_id(self) -> str:
        """Which start of the replica it leads to, as `routing.registry.Member` has it."""
        ...

    @property
    def facts(self) -> EngineFacts: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def num_opened(self) -> int:
        """Requests sent over it so far."""
        ...

    @property
    def num_counted(self) -> int | None:
        """How many of those are in `stats`; None where the replica does not say."""
        ...

    @property
    def turn(self) -> int:
        """How many other ingresses may use first what the replica wants."""
        ...

    @property
    def alive(self) -> bool: ...

    def open(self, request: GenerateRequest) -> DeltaSource: ...

    def prefetch(self, adapter_id: str) -> None: ...

    async def close(self) -> None: ...


class LinkEvents:
    """What a link tells its slot; `replicas.channel.LinkOptions` has the same two callbacks."""

    def __init__(self, on_stats: Callable[[], None], on_lost: Callable[[], None]) -> None:
        self.on_stats = on_stats
        self.on_lost = on_lost


Connect = Callable[[Member, LinkEvents], Awaitable[Link]]
"""Opens a link to a member; raises ChannelError."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the request path takes from outside: seconds, randomness, and where to count."""

    clock: Callable[[], float]
    random: Random
    metrics: Metrics


class Sent:
    """A request on its way: counted beside the pushed state until that must contain it.

    `number`: of the link's requests; None for one that is only about to be sent.
    """

    __slots__ = ("at", "counts", "num_pushes", "num_uncached", "number")

    def __init__(self, num_uncached: int, num_pushes: int, at: float) -> None:
        self.num_uncached = num_uncached
        self.num_pushes = num_pushes
        self.at = at
        self.number: int | None = None
        self.counts = True


@dataclass(frozen=True, slots=True)
class _Belief:
    """Rates to go by instead of those that the replica tells, which had made so many steps then."""

    prefill_tokens_per_s: float
    step_time_s: float
    num_steps: int


class Slot:
    """A replica's place in the fleet. `link` is None while it cannot be reached; `leaving` once it is no member."""

    def __init__(self, replica_id: str, model_id: str, max_ahead: int, clock: Callable[[], float]) -> None:
        self.replica_id = replica_id
        self.model_id = model_id
        self.link: Link | None = None
        self.leaving = False
        self.breaker = Breaker(clock)
        self.num_in_flight = 0
        self._max_ahead = max_ahead
        self._clock = clock
        self._num_pushes = 0
        self._sent: deque[Sent] = deque()
        self._num_sent = 0
        self._num_sent_tokens = 0
        self._asked = AskedAdapters(clock)
        self._believed: _Belief | None = None
        self._busy_at = clock()
        self._state: ReplicaState | None = None

    @property
    def idle_s(self) -> float:
        """How long it has had nothing to do."""
        return 0.0 if self._has_work else self._clock() - self._busy_at

    def believe(self, prefill_tokens_per_s: float, step_time_s: float) -> None:
        """Routing is to go by these rates until the replica has learnt enough that is new."""
        if self.link is not None:
            self._believed = _Belief(prefill_tokens_per_s, step_time_s, self.link.stats.num_steps)
            self.changed()

    @property
    def _has_work(self) -> bool:
        stats = None if self.link is None else self.link.stats
        return stats is not None and bool(stats.num_running or stats.num_waiting or self._num_sent)

    @property
    def ready(self) -> bool:
        """Whether it can take a request at all."""
        return self.link is not None and not self.leaving and not self.link.stats.draining and not self.breaker.is_open

    @property
    def num_free(self) -> int:
        """Places for one more: up to its running capacity, and `max_ahead` that wait there.

        One that lets requests wait already is at its capacity, whatever `max_num_seqs` says (KV may be short).
        """
        if self.link is None or not self.ready:
            return 0
        stats = self.link.stats
        num_loading = stats.num_waiting_adapter  # they wait for something else than a place
        num_waiting = stats.num_waiting - num_loading
        room = 0 if num_waiting else max(0, self.link.facts.max_num_seqs - stats.num_running - num_loading)
        return max(0, room + self._max_ahead - num_waiting - self._num_sent)

    def connected(self, link: Link) -> None:
        """A new connection: nothing sent over an older one counts."""
        self.link = link
        while self._sent:
            self.arrived(self._sent.popleft())
        self._asked.clear()
        self.changed()

    def disconnected(self) -> None:
        self.link, self._believed = None, None
        self.changed()

    def changed(self) -> None:
        """Something `state` is made of is different now."""
        self._state = None

    def pushed(self) -> None:
        """The link has new stats."""
        self._num_pushes += 1
        old_enough = self._clock() - MIN_SENT_S
        while self._sent and (not self._sent[0].counts or self._is_in_stats(self._sent[0], old_enough)):
            self.arrived(self._sent.popleft())
        if self.link is not None:
            self._asked.heard(self.link.stats, self._num_pushes)
            if self._has_work:
                self._busy_at = self._clock()
            if self._believed is not None and self.link.stats.num_steps >= self._believed.num_steps + STEPS_TO_LEARN:
                self._believed = None
        self.changed()

    def prefetch(self, adapter_id: str) -> None:
        """Tells the replica that a request for the adapter will come. No-op without a link."""
        if self.link is not None:
            self.link.prefetch(adapter_id)
            self._asked.ask(adapter_id, self._num_pushes)
            self.changed()

    def open(self, request: GenerateRequest, num_uncached: int) -> tuple[DeltaSource, Sent]:
        """Sends a request. Raises LinkLostError when there is no link, and what `Link.open` raises."""
        if self.link is None:
            raise LinkLostError(self.replica_id, "not connected")
        source = self.link.open(request)
        if request.adapter is not None:
            self._asked.ask(request.adapter, self._num_pushes)
        sent = self.expect(num_uncached)
        sent.number = self.link.num_opened
        self.num_in_flight += 1
        return source, sent

    def expect(self, num_uncached: int) -> Sent:
        """Counts a request that is about to be sent, until `arrived`."""
        sent = Sent(num_uncached, self._num_pushes, self._clock())
        self._sent.append(sent)
        self._num_sent += 1
        self._num_sent_tokens += num_uncached
        self.changed()
        return sent

    def arrived(self, sent: Sent) -> None:
        """The pushed state contains it by now, or it is over. Idempotent."""
        if sent.counts:
            sent.counts = False
            self._num_sent -= 1
            self._num_sent_tokens -= sent.num_uncached
            self.changed()

    def _is_in_stats(self, sent: Sent, old_enough: float) -> bool:
        """Whether the pushed state must contain it: the replica says so, or has had time to."""
        if sent.number is not None and self.link is not None and self.link.num_counted is not None:
            return sent.number <= self.link.num_counted
        return sent.num_pushes + MIN_PUSHES <= self._num_pushes and sent.at <= old_enough

    def state(self) -> ReplicaState | None:
        """What routing may know of it; None without a link."""
        if self._state is None and self.link is not None:
            self._state = self._make_state(self.link.facts, self.link.stats)
        return self._state

    def _pending(self, facts: EngineFacts, stats: EngineStats) -> Pending:
        if facts.prefill_order != SHORTEST:
            return NOBODY
        sent = [sent.num_uncached for sent in self._sent if sent.counts] if self._num_sent else ()
        return pending_of(merged(stats.waiting_sizes, sent))

    def _make_state(self, facts: EngineFacts, stats: EngineStats) -> ReplicaState:
        rates = self._believed or stats
        return ReplicaState(
            replica_id=self.replica_id,
            model=self.model_id,
            max_model_len=facts.max_model_len,
            max_num_seqs=facts.max_num_seqs,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_waiting_tokens=stats.num_waiting_tokens,
            num_free_blocks=stats.num_free_blocks,
            num_blocks=stats.num_blocks,
            block_size=facts.block_size,
            prefill_tokens_per_s=rates.prefill_tokens_per_s,
            step_time_s=rates.step_time_s,
            adapters=self._asked.resident(stats),
            max_adapters=facts.max_adapters,
            loading=self._asked.loading(stats),
            adapter_load_s=stats.adapter_load_s,
            adapter_queue_s=stats.adapter_queue_s,
            num_sent=self._num_sent,
            num_sent_tokens=self._num_sent_tokens,
            draining=stats.draining or self.leaving,
            breaker_open=self.breaker.is_open,
            prefill_order=facts.prefill_order,
            max_num_batched_tokens=facts.max_num_batched_tokens,
            full=self.num_free == 0,
            wanted_tokens=stats.wanted_tokens,
            num_places=stats.num_places - self._num_sent,
            turn=self.link.turn if self.link is not None else 0,
            pending=self._pending(facts, stats),
        )
