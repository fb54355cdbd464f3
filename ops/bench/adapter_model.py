"""Adapters on replicas, as little of it as decides about swaps and waiting: no tokens, no KV, no scheduler.

A request waits for its adapter, then for the replica's prefill (one at a time, those that are ready first come first
served), and holds its adapter's slot until its decode ends. Slots, placement and the costs are the product's own code.

    arrival ─ choose ─► load (if absent; bounded loaders) ─► prefill ─► decode, adapter pinned ─► end
"""

from __future__ import annotations

from bisect import bisect
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import accumulate, count
from random import Random
from typing import TypeAlias

from gateway.homes import DEMAND_HALF_LIFE_S, PLACE_EVERY_S
from replicas.adapter_slots import AdapterSlots
from routing.decay import DecayedCounts
from routing.placement import REFERENCE_RANK, Rendezvous, adapter_wait_s, place, stray_s
from routing.policy import TIE_S
from routing.types import ReplicaState, RouteRequest

NUM_LOADERS = 2
REFERENCE_LOAD_S = 0.05
"""What a replica would have learnt for rank 8: load times are this times rank / 8."""


@dataclass(frozen=True, slots=True)
class World:
    """What is simulated: `load` is the prefill load of each replica (1 = all of its time), `prefill_s` a request's mean
    prefill, `decode_s` what it then holds its adapter for; load times are uniform between the two bounds."""

    num_adapters: int
    zipf: float
    num_slots: int
    num_replicas: int = 8
    load: float = 0.6
    prefill_s: float = 0.1
    decode_s: float = 0.4
    min_load_s: float = 0.05
    max_load_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float
    adapter: int
    prefill_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """`swap_rate`: loads a request. `imbalance`: the busiest replica's prefill work over the mean."""

    swap_rate: float
    imbalance: float
    ttft_p50_s: float
    ttft_p99_s: float


def arrivals(world: World, num_requests: int, seed: int) -> list[Arrival]:
    """Poisson arrivals; adapters by Zipf, sizes exponential."""
    random = Random(seed)
    cumulative = list(accumulate((i + 1) ** -world.zipf for i in range(world.num_adapters)))
    rate = world.load * world.num_replicas / world.prefill_s
    now = 0.0
    found = []
    for _ in range(num_requests):
        now += random.expovariate(rate)
        adapter = bisect(cumulative, random.random() * cumulative[-1])
        found.append(Arrival(now, min(adapter, world.num_adapters - 1), random.expovariate(1 / world.prefill_s)))
    return found


def ranks_of(world: World, seed: int) -> list[int]:
    """Each adapter's rank, which its load time grows with."""
    random = Random(f"ranks {seed}")
    low, high = (round(s / REFERENCE_LOAD_S * REFERENCE_RANK) for s in (world.min_load_s, world.max_load_s))
    return [random.randint(low, high) for _ in range(world.num_adapters)]


def pooled_misses(world: World, requests: Sequence[Arrival]) -> list[bool]:
    """Of each request, whether one LRU cache with the slots of all replicas together would have to load."""
    cache: OrderedDict[int, None] = OrderedDict()
    missed = []
    for request in requests:
        missed.append(request.adapter not in cache)
        cache[request.adapter] = None
        cache.move_to_end(request.adapter)
        if len(cache) > world.num_slots * world.num_replicas:
            cache.popitem(last=False)
    return missed


def pooled_lru(world: World, requests: Sequence[Arrival], num_skipped: int) -> float:
    """Loads a request, after the first `num_skipped`, of that one cache."""
    missed = pooled_misses(world, requests)[num_skipped:]
    return sum(missed) / len(missed)


def unqueued_p99_s(world: World, requests: Sequence[Arrival], num_skipped: int, seed: int) -> float:
    """The p99 TTFT if that cache were everywhere and nobody ever waited for anybody: own load and own prefill alone."""
    ranks = ranks_of(world, seed)
    pairs = list(zip(requests, pooled_misses(world, requests), strict=True))[num_skipped:]
    times = sorted(r.prefill_s + missed * REFERENCE_LOAD_S * ranks[r.adapter] / REFERENCE_RANK for r, missed in pairs)
    return times[int(0.99 * len(times))]


@dataclass(frozen=True, slots=True)
class Asked:
    arrival: Arrival
    index: int
    adapter_id: str


@dataclass(slots=True)
class Replica:
    """One replica. `pending_s`: prefill that waits or runs; `work_s`: all it was given; `ends_at`: loads under way."""

    replica_id: str
    slots: AdapterSlots
    num_open: int = 0
    work_s: float = 0.0
    pending_s: float = 0.0
    busy: bool = False
    waiters: dict[str, list[Asked]] = field(default_factory=dict)
    wanted: deque[str] = field(default_factory=deque)
    ends_at: dict[str, float] = field(default_factory=dict)
    ready: deque[Asked] = field(default_factory=deque)


Choice: TypeAlias = Callable[["Simulation", Asked], Replica]


def by_cost(simulation: Simulation, asked: Asked) -> Replica:
    """The least wait for prefill and adapter, harm of straying from home included."""
    now = simulation.now
    if now >= simulation.place_at:
        simulation.homes = place(
            simulation.demand.shares(), simulation.rendezvous, simulation.living(), simulation.homes
        )
        simulation.place_at = now + PLACE_EVERY_S
    simulation.demand.add(asked.adapter_id, asked.arrival.prefill_s, now)
    homes = simulation.homes.get(asked.adapter_id) or simulation.rendezvous.order(asked.adapter_id)[:1]
    request = simulation.route_request(asked)
    states = [simulation.state(replica) for replica in simulation.replicas]
    costs = [
        max(replica.pending_s, adapter_wait_s(request, state)) + stray_s(request, state, homes)
        for replica, state in zip(simulation.replicas, states, strict=True)
    ]
    bound = min(costs) + TIE_S
    equal = [replica for replica, cost in zip(simulation.replicas, costs, strict=True) if cost <= bound]
    return simulation.random.choice([r for r in equal if r.replica_id in homes] or equal)  # prompts are strangers here


def least_outstanding(simulation: Simulation, asked: Asked) -> Replica:
    """The fewest open requests, drawn among equals."""
    fewest = min(replica.num_open for replica in simulation.replicas)
    return simulation.random.choice([r for r in simulation.replicas if r.num_open == fewest])


class Simulation:
    """One run of one policy. Events are (time, number, what)."""

    def __init__(self, world: World, choose: Choice, seed: int = 0) -> None:
        self.world = world
        self.now = 0.0
        self.random = Random(seed)
        self.replicas = [Replica(f"r{i}", AdapterSlots(world.num_slots)) for i in range(world.num_replicas)]
        self.rendezvous = Rendezvous([replica.replica_id for replica in self.replicas])
        self.demand = DecayedCounts(DEMAND_HALF_LIFE_S)
        self.homes: dict[str, tuple[str, ...]] = {}
        self.place_at = 0.0
        self._choose = choose
        self._rank = {str(adapter): rank for adapter, rank in enumerate(ranks_of(world, seed))}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._num_loads = 0
        self._ttft: dict[int, float] = {}

    def run(self, requests: Sequence[Arrival], num_skipped: int) -> Outcome:
        """Runs all of them to their end; the outcome leaves the first `num_skipped` out."""
        for i, arrival in enumerate(requests):
            self._at(arrival.at, partial(self._arrive, Asked(arrival, i, str(arrival.adapter))))
        begins = requests[num_skipped].at
        loads_before, work_before = 0, [0.0] * len(self.replicas)
        while self._events:
            earlier = self.now < begins
            self.now, _, act = heappop(self._events)
            if earlier and self.now >= begins:
                loads_before, work_before = self._num_loads, [r.work_s for r in self.replicas]
            act()
        work = [r.work_s - before for r, before in zip(self.replicas, work_before, strict=True)]
        times = sorted(s for i, s in self._ttft.items() if i >= num_skipped)
        return Outcome(
            (self._num_loads - loads_before) / (len(requests) - num_skipped),
            max(work) / (sum(work) / len(work)),
            times[len(times) // 2],
            times[int(0.99 * len(times))],
        )

    # What a policy sees.

    def route_request(self, asked: Asked) -> RouteRequest:
        rank = self._rank[asked.adapter_id]
        return RouteRequest("", "m", asked.adapter_id, (), 64, 1, 1, adapter_rank=rank)

    def state(self, replica: Replica) -> ReplicaState:
        """A replica as its ingress would see it."""
        return ReplicaState(
            replica.replica_id, "m", 8192, 64,
            adapters=replica.slots.resident,
            max_adapters=self.world.num_slots,
            loading=tuple([(name, self._left_s(replica, name)) for name in replica.waiters]),
            adapter_load_s=REFERENCE_LOAD_S,
            adapter_queue_s=self._queue_s(replica),
        )  # fmt: skip

    def living(self) -> dict[str, list[str]]:
        """Where each adapter is resident or being loaded."""
        found: dict[str, list[str]] = {}
        for replica in self.replicas:
            for name in (*replica.slots.resident, *replica.waiters):
                found.setdefault(name, []).append(replica.replica_id)
        return found

    def _load_s(self, adapter_id: str) -> float:
        return REFERENCE_LOAD_S * self._rank[adapter_id] / REFERENCE_RANK

    def _queue_s(self, replica: Replica) -> float:
        queue_s = sum(map(self._load_s, replica.wanted)) / NUM_LOADERS
        if len(replica.ends_at) >= NUM_LOADERS:
            queue_s += min(replica.ends_at.values()) - self.now
        if not replica.slots.has_room:
            queue_s += self.world.decode_s / self.world.num_slots
        return queue_s

    def _left_s(self, replica: Replica, adapter_id: str) -> float:
        at = replica.ends_at.get(adapter_id)
        return self._queue_s(replica) + self._load_s(adapter_id) if at is None else at - self.now

    # What happens.

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heappush(self._events, (when, next(self._numbers), act))

    def _arrive(self, asked: Asked) -> None:
        replica = self._choose(self, asked)
        replica.num_open += 1
        replica.pending_s += asked.arrival.prefill_s
        replica.work_s += asked.arrival.prefill_s
        slots, name = replica.slots, asked.adapter_id
        slots.used(name, self.now)
        if slots.is_resident(name):
            slots.pin(name)
            self._ready(replica, asked)
            return
        if name not in replica.waiters:
            replica.waiters[name] = []
            replica.wanted.append(name)
        replica.waiters[name].append(asked)
        self._pump(replica)

    def _pump(self, replica: Replica) -> None:
        while replica.wanted and len(replica.ends_at) < NUM_LOADERS and replica.slots.has_room:
            name = replica.wanted.popleft()
            replica.slots.claim(name)
            self._num_loads += 1
            replica.ends_at[name] = self.now + self._load_s(name)
            self._at(replica.ends_at[name], partial(self._loaded, replica, name))

    def _loaded(self, replica: Replica, name: str) -> None:
        del replica.ends_at[name]
        replica.slots.loaded(name)
        for asked in replica.waiters.pop(name):
            replica.slots.pin(name)
            self._ready(replica, asked)
        self._pump(replica)

    def _ready(self, replica: Replica, asked: Asked) -> None:
        replica.ready.append(asked)
        self._prefill(replica)

    def _prefill(self, replica: Replica) -> None:
        if not replica.busy and replica.ready:
            replica.busy = True
            asked = replica.ready.popleft()
            self._at(self.now + asked.arrival.prefill_s, partial(self._first_token, replica, asked))

    def _first_token(self, replica: Replica, asked: Asked) -> None:
        replica.busy = False
        replica.pending_s -= asked.arrival.prefill_s
        self._ttft[asked.index] = self.now - asked.arrival.at
        self._at(self.now + self.world.decode_s, partial(self._end, replica, asked))
        self._prefill(replica)

    def _end(self, replica: Replica, asked: Asked) -> None:
        replica.num_open -= 1
        replica.slots.unpin(asked.adapter_id)
        self._pump(replica)
