"""A fixed number of KV blocks: reference counts, an exact prefix cache, LRU eviction tail-first.

    every block is in exactly one place
    ┌──────────┐ allocate ┌───────────────┐ free, not cached ┌──────────┐
    │ free     │ ───────► │ used (refs>0) │ ───────────────► │ free     │
    └──────────┘          └───────────────┘                  └──────────┘
         ▲                   ▲         │ free, cached
         │ evict             │ acquire ▼
         └────────────────┌───────────────┐
                          │ idle (refs=0) │  least recently used first
                          └───────────────┘

A full block enters the cache under the key (parent, token ids): the parent is the uid of the cached block before it,
or the namespace at a root. Keys are compared by value, so two prefixes meet only where every token and the namespace
are equal. Uids are never reused; a key with an evicted parent can therefore never be found again by accident.

Whoever holds a cached block holds all its ancestors, because equal blocks are made one (`store`) and tables are
released as a whole, last block first. So an ancestor is never evicted before its descendants, and the head of the LRU
is a leaf.
The idea of hashing full blocks into chains is vLLM's; exact keys in place of hashes are not.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from replicas.contract import BlocksEvicted, BlocksStored, CacheCleared, KvEvent

Parent: TypeAlias = int | str
"""Uid of the cached block before, or the namespace in front of a first block."""

Key: TypeAlias = tuple[Parent, bytes]

_TOKEN_BYTES = 4


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """A block in the prefix cache. `tokens` are its packed ids."""

    uid: int
    parent: Parent
    tokens: bytes
    namespace: str


class Reach(NamedTuple):
    """How far the cache holds a prompt: so many blocks, the last being `block_id` under `uid`."""

    num_blocks: int
    block_id: int
    uid: int


NOWHERE = Reach(0, 0, 0)


class BlockPool:
    """Owns block ids `0 … num_blocks - 1`, each holding the KV of `block_size` tokens. Every operation is O(1) a block.

    `max_events` bounds uncollected KV events: beyond it they are replaced by `CacheCleared` and one `BlocksStored` for
    each cached block, so a slow reader costs memory in proportion to the cache and still ends with the truth.
    """

    def __init__(self, num_blocks: int, block_size: int, max_events: int = 65536) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a block pool needs blocks of tokens: {num_blocks=} {block_size=}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._max_events = max_events
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._cached: dict[int, CachedBlock] = {}
        self._by_key: dict[Key, int] = {}
        self._next_uid = 1
        self._next_seq = 0
        self._events: list[KvEvent] = []
        self._events_lost = False

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: never used ones and idle cached ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Blocks in the prefix cache, idle or used."""
        return len(self._cached)

    @property
    def next_seq(self) -> int:
        """The `seq` that the next event will have."""
        return self._next_seq

    def num_idle(self, block_ids: Iterable[int]) -> int:
        """How many of these nobody holds: acquiring them takes as many from `num_free`."""
        refs = self._refs
        return sum(1 for block_id in block_ids if refs[block_id] == 0)

    def num_refs(self, block_id: int) -> int:
        return self._refs[block_id]

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks with undefined content; evicts the least recently used ones when none is free."""
        assert count <= self.num_free, f"{count=} free={self.num_free}"
        free = self._free
        if len(free) < count:
            self._evict(count - len(free))
        taken = [free.pop() for _ in range(count)]
        for block_id in taken:
            self._refs[block_id] = 1
        return taken

    def match(self, namespace: str, tokens: array[int]) -> list[int]:
        """The cached blocks that hold the longest prefix of `tokens`, in order; takes no reference."""
        packed = tokens.tobytes()
        stride = self.block_size * _TOKEN_BYTES
        parent: Parent = namespace
        found: list[int] = []
        for start in range(0, len(packed) - stride + 1, stride):
            block_id = self._by_key.get((parent, packed[start : start + stride]))
            if block_id is None:
                break
            found.append(block_id)
            parent = self._cached[block_id].uid
        return found

    def reach(self, namespace: str, tokens: array[int], seen: Reach = NOWHERE) -> Reach:
        """How far `tokens` are cached, given how far they were when last looked at: O(1) when little has changed.

        A cached block's ancestors are cached too, so of those seen only the last need be looked at.
        """
        entry = self._cached.get(seen.block_id) if seen.num_blocks else None
        if entry is None or entry.uid != seen.uid:
            seen = NOWHERE
        parent: Parent = seen.uid if seen.num_blocks else namespace
        size = self.block_size
        for i in range(seen.num_blocks, len(tokens) // size):
            block_id = self._by_key.get((parent, tokens[i * size : (i + 1) * size].tobytes()))
            if block_id is None:
                break
            parent = uid = self._cached[block_id].uid
            seen = Reach(i + 1, block_id, uid)
        return seen

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Takes one more reference to each: they cannot be evicted until freed."""
        for block_id in block_ids:
            if self._refs[block_id] == 0:
                del self._idle[block_id]
            self._refs[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Gives back one reference to each block of a table, last block first so that tails are evicted first."""
        for block_id in reversed(block_ids):
            refs = self._refs[block_id] - 1
            assert refs >= 0, f"{block_id=} freed twice"
            self._refs[block_id] = refs
            if refs:
                continue
            if block_id in self._cached:
                self._idle[block_id] = None
            else:
                self._free.append(block_id)

    def store(self, namespace: str, tokens: array[int], table: list[int], span: range) -> None:
        """Caches the full, computed blocks `table[i]` for i in `span`, holding `tokens[i * block_size …]`.

        Where an equal block is cached already, the table takes that one and its own is given back: that keeps chains
        whole, and two requests that computed the same prompt at the same time end up sharing one copy. Blocks whose
        parent left the cache (`clear`) are skipped.
        """
        if not span:
            return
        before = None if span.start == 0 else self._cached.get(table[span.start - 1])
        if span.start > 0 and before is None:
            return
        parent: Parent = namespace if before is None else before.uid
        size = self.block_size
        added: list[CachedBlock] = []
        for i in span:
            block_tokens = tokens[i * size : (i + 1) * size].tobytes()
            existing = self._by_key.get((parent, block_tokens))
            if existing is not None:
                self._publish(added)
                added = []
                parent = self._cached[existing].uid
                if existing != table[i]:
                    self.acquire((existing,))
                    self.free((table[i],))
                    table[i] = existing
                continue
            entry = CachedBlock(self._next_uid, parent, block_tokens, namespace)
            self._next_uid += 1
            self._cached[table[i]] = entry
            self._by_key[(parent, block_tokens)] = table[i]
            parent = entry.uid
            added.append(entry)
        self._publish(added)

    def clear(self) -> None:
        """Empties the prefix cache. Blocks in use stay with their holders, uncached."""
        self._cached.clear()
        self._by_key.clear()
        self._free.extend(self._idle)
        self._idle.clear()
        self._emit(CacheCleared(self._take_seq()))

    def take_events(self) -> list[KvEvent]:
        """KV events since the last call, in order of `seq`."""
        if self._events_lost:
            self._events_lost = False
            self._events = [CacheCleared(self._take_seq())]
            # A parent's uid is smaller than its children's, so this order names parents first.
            for entry in sorted(self._cached.values(), key=lambda cached: cached.uid):
                self._events.append(self._stored([entry]))
        events, self._events = self._events, []
        return events

    def check(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Asserts every invariant; `tables`, where given, are all the block lists that hold references."""
        free, idle = set(self._free), set(self._idle)
        used = {block_id for block_id, refs in enumerate(self._refs) if refs > 0}
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & idle and not free & used and not idle & used, "a block is in two places"
        assert len(free) + len(idle) + len(used) == self.num_blocks, "a block is lost"
        assert all(refs >= 0 for refs in self._refs)
        assert idle <= self._cached.keys() and not free & self._cached.keys()
        assert self._by_key == {(entry.parent, entry.tokens): block for block, entry in self._cached.items()}
        assert len(self._by_key) == len(self._cached), "two blocks under one key"
        by_uid = {entry.uid: block for block, entry in self._cached.items()}
        assert len(by_uid) == len(self._cached), "a uid is used twice"
        position = {block: i for i, block in enumerate(self._idle)}
        for block, entry in self._cached.items():
            assert len(entry.tokens) == self.block_size * _TOKEN_BYTES
            if isinstance(entry.parent, str):
                assert entry.parent == entry.namespace
                continue
            parent = by_uid.get(entry.parent)
            assert parent is not None, f"{block=} outlived its parent"
            assert self._cached[parent].namespace == entry.namespace
            assert self._refs[parent] >= 1 or self._refs[block] == 0, f"{block=} is held without its parent"
            if parent in position:
                assert position[block] < position[parent], f"{parent=} would be evicted before {block=}"
        if tables is not None:
            held = Counter(block_id for table in tables for block_id in table)
            assert {block: self._refs[block] for block in used} == dict(held), "wrong reference counts"

    def _evict(self, count: int) -> None:
        uids = []
        for _ in range(count):
            block_id, _ = self._idle.popitem(last=False)
            entry = self._cached.pop(block_id)
            del self._by_key[(entry.parent, entry.tokens)]
            self._free.append(block_id)
            uids.append(entry.uid)
        self._emit(BlocksEvicted(self._take_seq(), tuple(uids)))

    def _publish(self, added: list[CachedBlock]) -> None:
        if added:
            self._emit(self._stored(added))

    def _stored(self, chain: list[CachedBlock]) -> BlocksStored:
        first = chain[0]
        return BlocksStored(
            seq=self._take_seq(),
            block_ids=tuple(entry.uid for entry in chain),
            parent_id=None if isinstance(first.parent, str) else first.parent,
            token_ids=b"".join(entry.tokens for entry in chain),
            namespace=first.namespace,
        )

    def _take_seq(self) -> int:
        seq = self._next_seq
        self._next_seq += 1
        return seq

    def _emit(self, event: KvEvent) -> None:
        if self._events_lost:
            return
        if len(self._events) >= self._max_events:
            self._events_lost = True
            self._events.clear()
            return
        self._events.append(event)
