"""What one ingress knows: the gateway's slots, routing's index or mirror, homes of adapters; as late as news comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random

from gateway.homes import PLACE_EVERY_S, AdapterHomes
from gateway.slot import Sent
from ops.simulate.fleet import FleetSpec
from ops.simulate.link import SimLink, SimSlot
from ops.simulate.replica import SimReplica
from replicas.contract import GenerateRequest
from routing.index import PrefixIndex
from routing.mirror import Mirror
from routing.placement import adapter_wait_s
from routing.policies import PolicySpec
from routing.types import ReplicaState, RouteRequest, Snapshot


class KvFeed:
    """One replica's KV events on their way to one ingress."""

    __slots__ = ("_delay_s", "_events", "_index", "_replica_id")

    def __init__(self, replica_id: str, index: PrefixIndex, delay_s: float) -> None:
        self._replica_id = replica_id
        self._index = index
        self._delay_s = delay_s
        self._events: deque[tuple[float, str, tuple[int, ...]]] = deque()

    def tell(self, now: float, kind: str, hashes: tuple[int, ...]) -> None:
        """The replica publishes an event now."""
        self._events.append((now + self._delay_s, kind, hashes))

    def look(self, now: float) -> None:
        """Applies what has arrived by now."""
        events = self._events
        while events and events[0][0] <= now:
            _, kind, hashes = events.popleft()
            if kind == "stored":
                self._index.insert(self._replica_id, hashes)
            else:
                self._index.evict(self._replica_id, hashes)


class View:
    """`clock`: the virtual time. `feeds` (one per replica, or none) must hear the replicas' KV events.

    Replicas are numbered; `ids` are their names in routing.
    """

    def __init__(
        self, policy: PolicySpec, spec: FleetSpec, replicas: list[SimReplica], clock: Callable[[], float]
    ) -> None:
        self.ids = [f"r{i}" for i in range(len(replicas))]
        self.number = {replica_id: i for i, replica_id in enumerate(self.ids)}
        self.slots = [
            SimSlot(SimLink(replica_id, replica, spec.stats_delay_s, clock), spec.max_ahead, clock)
            for replica_id, replica in zip(self.ids, replicas, strict=True)
        ]
        self.feeds: list[KvFeed] = []
        self._replicas = replicas
        self._clock = clock
        self._random = Random(spec.seed)
        self._num_decisions = 0
        self._asked: tuple[RouteRequest, dict[str, int]] | None = None  # the last answer, while nothing has changed
        self._homes = AdapterHomes(lambda _model: self.states(), clock)
        self._homes_due = PLACE_EVERY_S
        self._mirror = Mirror() if policy.reads == "mirror" else None
        self._index = PrefixIndex(0)
        self._know(policy, spec, replicas[0].cache.block_tokens)

    def look(self) -> None:
        """Takes in every push and KV event that has arrived."""
        now = self._clock()
        self._asked = None
        for slot in self.slots:
            slot.look(now)
        self._index.expire(now)
        for feed in self.feeds:
            feed.look(now)
        if self.slots[0].link.facts.max_adapters and now >= self._homes_due:
            self._homes_due = now + PLACE_EVERY_S
            self._homes.refresh()

    def states(self) -> tuple[ReplicaState, ...]:
        """Every replica as it is believed to be."""
        return tuple([state for slot in self.slots if (state := slot.slot.state()) is not None])

    @property
    def prefill_tokens_per_s(self) -> float:
        """The mean of the replicas that know theirs; 0 while none does."""
        rates = [slot.link.stats.prefill_tokens_per_s for slot in self.slots]
        known = [rate for rate in rates if rate > 0]
        return sum(known) / len(known) if known else 0.0

    def has_place(self) -> bool:
        """Whether any replica can take one more."""
        return any(slot.slot.num_free > 0 for slot in self.slots)

    def matched(self, route: RouteRequest) -> dict[str, int]:
        """Leading blocks of the prompt that each replica is believed to hold."""
        if self._asked is not None and self._asked[0] is route:
            return self._asked[1]
        known = self._index if self._mirror is None else self._mirror
        found = known.match(route.block_hashes)
        self._asked = (route, found)
        return found

    def snapshot(self, route: RouteRequest) -> Snapshot:
        """All a policy may know, as `gateway.router` puts it together."""
        held = {} if self._mirror is None else self._mirror.held_blocks()
        turn, self._num_decisions = self._num_decisions, self._num_decisions + 1
        draw = self._random.random()
        matched, homes = self.matched(route), self._homes.of(route)
        return Snapshot(self.states(), matched, turn, draw, held, homes, self._index.guessed)

    def sent(self, route: RouteRequest, request: GenerateRequest, placing: tuple[int, int]) -> Sent:
        """A request goes to (replica, uncached prompt tokens)."""
        number, num_uncached = placing
        replica_id = self.ids[number]
        self._asked = None
        if self._mirror is not None:
            self._mirror.insert(replica_id, route.block_hashes)
        else:
            self._index.sent(replica_id, route.block_hashes, self._clock())
        self._homes.count(route, num_uncached)
        return self.slots[number].place(request, num_uncached)

    def prefetch(self, route: RouteRequest) -> None:
        """The request has to wait: its adapter's home may load it meanwhile, unless some replica has it."""
        if route.adapter is None:
            return
        loading = (name for state in self.states() for name, _ in state.loading)
        if route.adapter in loading or any(adapter_wait_s(route, state) == 0 for state in self.states()):
            return
        for replica_id in self._homes.of(route)[:1]:
            number = self.number[replica_id]
            self.slots[number].slot.prefetch(route.adapter)
            self._replicas[number].prefetch(route.adapter, route.adapter_rank, self._clock())

    def _know(self, policy: PolicySpec, spec: FleetSpec, block_tokens: int) -> None:
        """Begins to keep what the policy reads."""
        kv_tokens = spec.replica.kv_tokens
        num_blocks = kv_tokens // block_tokens + 1
        # Half as much again: what was just sent is there before the news of what makes room for it.
        self._index = PrefixIndex(3 * len(self.ids) * num_blocks // 2)
        for replica_id in self.ids:
            if self._mirror is not None:
                self._mirror.add(replica_id, policy.mirror_blocks(block_tokens, kv_tokens))
            elif policy.reads == "events":
                self._index.add(replica_id, num_blocks)
                if spec.events_delay_s is not None:
                    self._index.load(replica_id, ())
                    self._index.vouch(replica_id)  # `PagedCache` evicts tails first
                    self.feeds.append(KvFeed(replica_id, self._index, spec.events_delay_s))
