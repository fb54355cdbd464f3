"""Two ingresses and four sim replicas on one Valkey that loses, forgets, freezes and dies, under load all the while.

An auditor looks fifty times a second whether an ingress holds for certain what is not in a replica's cache any more.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from random import Random

from routing.index import PrefixIndex
from routing.kv_events import KvKeys
from routing.store import StoreError
from tests.gateway.kv_cluster import A_SECOND, Cluster, long_prompt, until

AUDITED = [long_prompt(number) for number in range(40)]
CLOCKS = (time.time, lambda: time.time() + 7200.0, lambda: time.time() - 86400.0, lambda: 5.0)
LONGEST_WRONG_S = 2.0


class Auditor:
    """Counts for how long a wrong word stood as a certain one. `num_wrong` shows that there was something to find.

    Where nothing at all runs on this machine for a while, its clock goes on by a tenth of a second only: nobody can
    learn meanwhile.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.worst_s = 0.0
        self.num_wrong = 0
        self._cluster = cluster
        self._hashes = [(prompt, cluster.hashes(prompt)) for prompt in AUDITED]
        self._since: dict[tuple[int, str, str], float] = {}
        self._now = 0.0

    async def run(self) -> None:
        looked_at = time.monotonic()
        while True:
            self.look()
            await asyncio.sleep(0.02)
            self._now += min(time.monotonic() - looked_at, 0.1)
            looked_at = time.monotonic()

    def look(self) -> None:
        now = self._now
        wrong = self._wrong()
        self.num_wrong += len(wrong - self._since.keys())
        self._since = {claim: self._since.get(claim, now) for claim in wrong}  # one that was withdrawn is over
        self.worst_s = max([self.worst_s, *(now - since for since in self._since.values())])

    def _wrong(self) -> set[tuple[int, str, str]]:
        """(ingress, replica, prompt) where more of the prompt is held for certain than is there."""
        found = set()
        held: dict[tuple[str, str], int] = {}
        for ingress in self._cluster.ingresses:
            index = ingress.fleet.index
            for prompt, hashes in self._hashes:
                for replica_id, num_blocks in index.match(hashes).items():
                    key = (replica_id, prompt)
                    if index.is_exact(replica_id) and key not in held:
                        held[key] = self._cluster.really_held(replica_id, prompt)
                    if index.is_exact(replica_id) and num_blocks > held[key]:
                        found.add((id(ingress), *key))
        return found


def without_expectations(index: PrefixIndex) -> None:
    """What was just sent is expected for two seconds, which is no certain word: the auditor would take it for one."""
    sent = index.sent

    def only_to_mirrors(replica_id: str, hashes: Sequence[int], now: float) -> None:
        if not index.is_exact(replica_id):
            sent(replica_id, hashes, now)

    index.sent = only_to_mirrors  # type: ignore[method-assign]


async def load(cluster: Cluster, random: Random) -> None:
    """Requests of old and new prompts, more than all caches together hold, through whichever ingress is there."""
    while True:
        prompt = random.choice(AUDITED) if random.random() < 0.5 else long_prompt(random.randrange(1000, 9999))
        await cluster.ask(random.choice(cluster.ingresses), prompt)  # fails the test for any status but 200
        await asyncio.sleep(random.random() * 0.01)


async def lose_events(cluster: Cluster) -> None:
    """The newest entry of two streams is gone before everybody has read it, and with it one snapshot."""
    store = cluster.ingresses[0].store
    for replica_id in ("r1", "r2"):
        keys = KvKeys(store.keys, replica_id)
        for _ in range(20):
            for entry in await store.execute("XREVRANGE", keys.stream, "+", "-", "COUNT", 1):
                await store.execute("XDEL", keys.stream, entry[0])
    await store.execute("DEL", KvKeys(store.keys, "r2").snapshot)


async def freeze(cluster: Cluster) -> None:
    cluster.valkey.signal(signal.SIGSTOP)
    await asyncio.sleep(1.6)
    cluster.valkey.signal(signal.SIGCONT)


async def empty(cluster: Cluster) -> None:
    """As soon as the breaker, open since the freeze, lets it through."""
    async with asyncio.timeout(5.0):
        while True:
            try:
                await cluster.ingresses[0].store.execute("FLUSHALL")
                return
            except StoreError:
                await asyncio.sleep(0.05)


async def restart_redis(cluster: Cluster) -> None:
    cluster.valkey.kill()
    await asyncio.sleep(0.3)
    cluster.valkey.start()


async def restart_replica(cluster: Cluster) -> None:
    (host,) = [host for host in cluster.hosts if host.replica_id == "r3"]
    cluster.hosts.remove(host)
    await host.drain()
    await host.close()
    await cluster.host(CLOCKS[3], "r3")
    await until(lambda: all(ingress.fleet.num_ready("m") == 4 for ingress in cluster.ingresses), 5.0)


async def restart_ingress(cluster: Cluster) -> None:
    """The new one knows what its siblings know within a second of its beginning, once they know all themselves: beside
    all that goes on here, which takes the processor too, within four."""
    await until(lambda: not any(ingress.fleet.index.guessed for ingress in cluster.ingresses), 5.0)
    async with asyncio.timeout(5.0):  # Redis, too, must have heard of all of them since it was emptied
        while len(await cluster.ingresses[0].watch.loads()) < 4:  # noqa: ASYNC110 a few polls
            await asyncio.sleep(0.02)
    began = time.monotonic()
    fresh = await cluster.ingress()
    without_expectations(fresh.fleet.index)
    assert time.monotonic() - began < 2 * A_SECOND
    assert not fresh.fleet.index.guessed
    await cluster.leave(cluster.ingresses[0])


async def test_no_wrong_word_stands_for_certain_for_two_seconds_and_no_request_fails(cluster: Cluster) -> None:
    for clock in CLOCKS:
        await cluster.host(clock)
    for _ in range(2):
        without_expectations((await cluster.ingress()).fleet.index)
    auditor, random = Auditor(cluster), Random(7)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(auditor.run())]
        clients = [group.create_task(load(cluster, Random(seed))) for seed in range(3)]
        for disturb in (lose_events, freeze, empty, restart_redis, restart_replica, restart_ingress):
            await asyncio.sleep(0.3 + 0.2 * random.random())
            await disturb(cluster)
        # Evictions take a moment to be known: the auditor must see some, on a machine that pauses too.
        await until(lambda: auditor.num_wrong > 10, 20.0)
        for task in (*tasks, *clients):
            task.cancel()
    await until(cluster.agree, 5.0)
    assert auditor.worst_s < LONGEST_WRONG_S
