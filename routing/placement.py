"""Where adapters should live, and what a replica without one costs a request: pure functions.

Every adapter has its own order of the replicas (rendezvous hashing, Thaler and Ravishankar 1998), the same at every
ingress. It lives on the first of them that has room, where room is bounded load (after consistent hashing with bounded
loads, Mirrokni, Thorup and Zadimoghaddam 2016) and a fair part of the adapters; one whose demand is more than a replica
can give it lives on as many as it needs.

    demand (decayed counts) ─► shares ─► place ─► homes of each adapter ─► Snapshot.homes ─► cost
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import ceil, frexp
from typing import TypeAlias

from xxhash import xxh3_64_intdigest

from routing.types import ReplicaState, RouteRequest

MAX_OVER_MEAN = 1.15
"""The most that a replica's share of adapter demand may exceed the mean."""

STAY = 1.1
"""Who lives on a replica may stay up to this much beyond the room for newcomers: shares are mere estimates."""

SPREAD_EVENLY = 0.8
"""The part of all smaller adapters' demand that every replica is expected to get its even share of."""

REFERENCE_RANK = 8
"""`adapter_load_s` is for this rank; a load's time grows with the rank."""

PRIOR_LOAD_S = 0.5
"""Assumed where no load has been measured yet."""

STRAY_LOADS = 14.0
"""Harm of loading an adapter away from its homes, in loads: somebody's place there is taken, who then strays or takes
another's. Measured with `warmgate bench adapters`, 100 adapters in 64 slots, swaps over those of one pooled cache:
1.17 to 1.23 times with 4, 1.10 to 1.13 with 6, 1.05 to 1.08 with 8, 1.01 to 1.05 with 12 to 15."""

STRAY_USES = 1.0
"""The same for using a copy that is there already, and that would go if nobody did. With 3 or 6 as much is swapped, and
the longest waits at high load grow by up to a fifth."""

MAX_STRAY_S = 1.0
"""Nobody waits longer than this at home for the sake of others' places there, or than one load, if that is more. In
the simulator (500 adapters on 8 replicas with 32 slots, Mooncake conversation at load 0.5) 98.0 % are in time with it
and 92.3 % without, at 0.24 and 0.20 swaps a request; with half of it 99.2 % and 0.26, but `bench adapters` swaps up to
1.09 times as much as one pooled cache."""

Homes: TypeAlias = Mapping[str, tuple[str, ...]]
"""Replicas by adapter, the best first."""


def wait_and_stray_s(request: RouteRequest, replica: ReplicaState, homes: Collection[str]) -> tuple[float, float]:
    """`adapter_wait_s` and `stray_s` in one look, for a request with an adapter."""
    adapter = request.adapter
    away = homes and replica.replica_id not in homes
    if adapter in replica.adapters:
        if not away:
            return 0.0, 0.0
        return 0.0, STRAY_USES * (replica.adapter_load_s or PRIOR_LOAD_S) * request.adapter_rank / REFERENCE_RANK
    load_s = (replica.adapter_load_s or PRIOR_LOAD_S) * request.adapter_rank / REFERENCE_RANK
    wait_s = replica.adapter_queue_s + load_s
    if replica.loading:
        for loading, left_s in replica.loading:
            if loading == adapter:
                wait_s = left_s
                break
    if not away:
        return wait_s, 0.0
    # Bounds without min() and max(): two calls for each replica of a large fleet would be a tenth of a decision.
    stray = STRAY_LOADS * load_s
    if stray > MAX_STRAY_S:
        stray = load_s if load_s > MAX_STRAY_S else MAX_STRAY_S
    return wait_s, stray


def adapter_wait_s(request: RouteRequest, replica: ReplicaState) -> float:
    """Seconds before this replica can use the request's adapter.

    0 when it is resident or none is asked for; what is left of a load under way; else the wait for a loader and a slot
    (when all are in use), and the load.
    """
    return 0.0 if request.adapter is None else wait_and_stray_s(request, replica, ())[0]


def stray_s(request: RouteRequest, replica: ReplicaState, homes: Collection[str]) -> float:
    """Harm done to others by using the adapter away from its homes: 0 at home, without an adapter or without homes."""
    return 0.0 if request.adapter is None else wait_and_stray_s(request, replica, homes)[1]


class Rendezvous:
    """The order in which each adapter likes the replicas: highest hash of (replica, adapter) first.

    A replica more or less moves only the adapters that like it best. Orders are remembered for one set of replicas.
    """

    def __init__(self, replica_ids: Collection[str]) -> None:
        self.replica_ids = tuple(sorted(replica_ids))
        self._encoded = [(replica_id.encode(), replica_id) for replica_id in self.replica_ids]
        self._orders: dict[str, tuple[str, ...]] = {}

    def order(self, adapter_id: str) -> tuple[str, ...]:
        """All replicas, the adapter's favourite first."""
        found = self._orders.get(adapter_id)
        if found is None:
            seed = xxh3_64_intdigest(adapter_id.encode())
            scored = sorted([(xxh3_64_intdigest(raw, seed), name) for raw, name in self._encoded], reverse=True)
            found = self._orders[adapter_id] = tuple([name for _, name in scored])
        return found


def place(
    shares: Mapping[str, float], rendezvous: Rendezvous, living: Mapping[str, Collection[str]], previous: Homes
) -> dict[str, tuple[str, ...]]:
    """The homes of every adapter that is asked for.

    `shares`: each adapter's part of all work of the model. `living`: the replicas where an adapter is resident or being
    loaded, as they tell it, so the same at every ingress. `previous`: the last result. An adapter stays where it lives
    as long as load allows.

    The largest choose first, in classes of powers of two (by hash within one, so that noise moves nobody). A home needs
    room for its part of the load beside an even share of all that is smaller; an adapter that no replica has such room
    for gets several. No replica gets more than its share of the adapters placed so far: then its slots hold what is
    hottest of its own, and all together what is hottest of all.
    """
    if not rendezvous.replica_ids:
        return {}
    plan = _Plan(rendezvous.replica_ids)
    homes: dict[str, tuple[str, ...]] = {}
    smaller = total = max(1.0, sum(shares.values()))  # the base model's own work is as good as many small adapters
    for names in _by_size(shares):
        smaller -= sum(shares[name] for name in names)
        room = (MAX_OVER_MEAN * total - SPREAD_EVENLY * smaller) / len(rendezvous.replica_ids)
        for name in names:
            order = rendezvous.order(name)
            at = _in_order(living.get(name, ()), previous.get(name, ()), order)
            homes[name] = plan.add(shares[name], room, order, at)
    return homes


def _in_order(living: Collection[str], previous: Sequence[str], order: Sequence[str]) -> list[str]:
    """Where an adapter lives: its homes so far first, then as it likes them."""
    at = [replica_id for replica_id in living if replica_id in order]
    if len(at) > 1:
        at.sort(key=lambda replica_id: (replica_id not in previous, order.index(replica_id)))
    return at


def _by_size(shares: Mapping[str, float]) -> Iterator[list[str]]:
    """Adapters in classes of powers of two, the largest first."""
    classes: dict[int, list[str]] = {}
    for name, share in shares.items():
        classes.setdefault(frexp(share)[1], []).append(name)
    for size in sorted(classes, reverse=True):
        yield sorted(classes[size], key=lambda name: xxh3_64_intdigest(name.encode()))


class _Plan:
    """What has been given to each replica so far."""

    def __init__(self, replica_ids: Sequence[str]) -> None:
        self._load = dict.fromkeys(replica_ids, 0.0)
        self._num = dict.fromkeys(replica_ids, 0)
        self._num_placed = 0

    def add(self, share: float, room: float, order: Sequence[str], at: Sequence[str]) -> tuple[str, ...]:
        """Homes for one adapter that lives `at` some replicas; `room`: the load that a replica may have with it."""
        num_replicas = len(order)
        least = max(1, min(num_replicas, ceil(share / room)))
        for wanted in range(least, min(num_replicas, 3 * least + 2) + 1):  # what fits nowhere whole may fit in parts
            homes = self._fitting(wanted, (share / wanted, room), order, at)
            if len(homes) == wanted:
                break
        else:
            homes = sorted(order, key=self._load.__getitem__)[:least]
        for replica_id in homes:
            self._load[replica_id] += share / len(homes)
            self._num[replica_id] += 1
        self._num_placed += len(homes)
        return tuple(homes)

    def _fitting(self, wanted: int, sizes: tuple[float, float], order: Sequence[str], at: Sequence[str]) -> list[str]:
        """Up to `wanted` replicas that can take a part: where it lives, then where there are few others, then any."""
        load, num, (part, room) = self._load, self._num, sizes
        homes = [r for r in at if load[r] + part <= room * STAY][:wanted]
        if len(homes) == wanted:
            return homes
        max_num = ceil((self._num_placed + wanted) / len(order))
        crowded: list[str] = []
        for replica_id in order:
            if load[replica_id] + part <= room and replica_id not in homes:
                if num[replica_id] < max_num:
                    homes.append(replica_id)
                    if len(homes) == wanted:
                        return homes
                else:
                    crowded.append(replica_id)
        return (homes + crowded)[:wanted]
