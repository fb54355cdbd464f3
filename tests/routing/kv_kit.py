"""Both ends of the KV registry on one Valkey, driven a round at a time: real block pools publish, real indexes read."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from replicas.contract import cache_namespace, pack_tokens
from replicas.engine.block_pool import BlockPool
from replicas.kv_blocks import BlocksOptions, RouteBlocks
from replicas.kv_publisher import KvPlace, KvPublisher, PublisherOptions
from routing.index import PrefixIndex
from routing.kv_events import KvKeys
from routing.kv_follow import KvSource
from routing.kv_registry import KvRegistry, KvRegistryOptions
from routing.prefix import Namespace, block_hashes
from routing.store import Store, StoreOptions

BLOCK_SIZE, BLOCK_TOKENS = 4, 8
NAMESPACE = cache_namespace(None, b"")


class Clock:
    """Moves only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def prompt(number: int, num_tokens: int = 80) -> list[int]:
    return [number, *range(num_tokens - 1)]


def hashes(tokens: Sequence[int]) -> tuple[int, ...]:
    return block_hashes(pack_tokens(tokens), BLOCK_TOKENS, Namespace("m"))


class Replica:
    """A block pool and its publisher. Every `publish` looks after Redis too, unless `beat_s` is set."""

    def __init__(self, store: Store, replica_id: str, *, epoch: int = 1, beat_s: float = 0.0) -> None:
        self.replica_id = replica_id
        self.epoch = epoch
        self.pool = BlockPool(400, BLOCK_SIZE)
        self.keys = KvKeys(store.keys, replica_id)
        place = KvPlace(replica_id, BLOCK_TOKENS, PublisherOptions(publish_s=0.01, beat_s=beat_s))
        blocks = RouteBlocks(BlocksOptions("m", BLOCK_TOKENS, 1000))
        self.publisher = KvPublisher(store, blocks, self.pool.take_events, place)
        self.publisher.begin(epoch)

    def compute(self, *prompts: Sequence[int]) -> None:
        """These prompts went through the engine, one after the other."""
        for tokens in prompts:
            packed = array("I", tokens)
            table = self.pool.match(NAMESPACE, packed)
            self.pool.acquire(table)
            num_matched = len(table)
            table = table + self.pool.allocate(len(tokens) // BLOCK_SIZE - num_matched)
            self.pool.store(NAMESPACE, packed, table, range(num_matched, len(table)))
            self.pool.free(table)

    def forget(self) -> None:
        """Other work took every block."""
        self.pool.free(self.pool.allocate(self.pool.num_blocks))

    def holds(self, tokens: Sequence[int]) -> int:
        """Leading routing blocks that are really in the cache."""
        return len(self.pool.match(NAMESPACE, array("I", tokens))) * BLOCK_SIZE // BLOCK_TOKENS

    async def publish(self) -> None:
        await self.publisher.publish()


class Ingress:
    """An index and its registry, connected to `replicas`."""

    def __init__(self, store: Store, *replicas: Replica, clock: Callable[[], float] | None = None) -> None:
        self.clock = Clock()
        self.index = PrefixIndex(100_000)
        self.replicas: list[Replica] = []
        options = KvRegistryOptions(poll_s=0.01, watch_s=0.02, clock=clock or self.clock)
        self.registry = KvRegistry(store, self.index, self._sources, options)
        for replica in replicas:
            self.connect(replica)

    def connect(self, replica: Replica) -> None:
        self.replicas = [r for r in self.replicas if r.replica_id != replica.replica_id] + [replica]
        self.index.add(replica.replica_id, 200)

    def _sources(self) -> list[KvSource]:
        return [KvSource(r.replica_id, r.epoch, BLOCK_TOKENS, r.pool.next_seq) for r in self.replicas]

    async def read(self) -> None:
        """Looks and reads once."""
        self.registry.look()
        await self.registry.read()
        self.index.check()

    async def heal(self, *publishing: Replica) -> None:
        """A few rounds of everybody, a tenth of a second apart, until all replicas are exact."""
        for _ in range(20):
            await self.read()
            if not self.index.guessed:
                return
            for replica in publishing:
                await replica.publish()
            self.clock.now += 0.1
        raise AssertionError(f"not healed: {self.index.guessed}, {self.registry.num_lost}")

    def agrees(self, *prompts: Sequence[int]) -> bool:
        """Whether the index says of every replica what is really in its cache."""
        for tokens in prompts:
            truth = {replica.replica_id: replica.holds(tokens) for replica in self.replicas}
            if self.index.match(hashes(tokens)) != {replica_id: num for replica_id, num in truth.items() if num}:
                return False
        return True


def store_for(url: str, cluster: str = "test") -> Store:
    return Store(url, cluster, StoreOptions(timeout_s=2.0, max_failures=3, open_s=0.1))
