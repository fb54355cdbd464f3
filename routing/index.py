"""Who holds which prefix block: what replicas say they hold, what was just sent to them, or a mirror of it.

    holders      block hash → bit mask of the replicas (by slot) that hold it or are about to
    per replica  held      its hashes, least recently used first
                 expected  hashes of prompts just sent to it → when to stop believing in them

One walk along a prompt's hashes then answers for every replica at once: the mask of those that have all blocks so far
only ever loses bits.

A replica begins mirrored: `held` is what was sent to it, bounded like a cache with LRU eviction. `load` makes it exact:
from then on `insert` and `evict` come from its own KV events, and what is sent to it is only expected. `doubt` turns it
back into a mirror that starts from what it last said. `routing.kv_registry` decides when.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, islice

PURGE_STEP = 512
"""Entries of departed replicas that one insertion cleans up: a death costs no pause."""

EXPECT_S = 2.0
"""How long a prompt that was sent counts as held without a word from the replica: a burst with one new prefix stays
together while the first of it is computed."""

NUM_SHARDS = 16
"""A dictionary is rebuilt in one go as it grows and churns: 0.7 s with 4 million entries. Sixteen small ones pause for
a sixteenth of that, at 80 ns a look-up; more of them would cost more cache misses than they save."""

HASH_BYTES = 48
"""What CPython allocates for an int of 64 bits."""


@dataclass(slots=True, eq=False)
class _Replica:
    """One replica's blocks. `bit` = 1 << slot."""

    replica_id: str
    bit: int
    capacity_blocks: int
    exact: bool = False
    held: dict[int, None] = field(default_factory=dict)
    expected: dict[int, float] = field(default_factory=dict)


class PrefixIndex:
    """A bounded map from block hash to replicas; about 140 bytes an entry.

    `guessed`: the replicas of which nothing is certain, because they are mirrored.

    All replicas together hold at most about `max_blocks` entries: a mirrored one gets its cache's size or an equal
    share, whichever is smaller, an exact one an equal share (what it holds can be more than its size suggests, as
    prompts may share half a routing block).
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._shards: list[dict[int, int]] = [{} for _ in range(NUM_SHARDS)]
        self._replicas: dict[str, _Replica] = {}
        self._by_bit: dict[int, str] = {}
        self._live = 0
        self._departed: list[_Replica] = []
        self._free_bits: list[int] = []
        self._num_slots = 0
        self._expiries: list[tuple[float, int, _Replica, Sequence[int]]] = []
        self._numbers = count()
        self.guessed: frozenset[str] = frozenset()

    def __len__(self) -> int:
        """Blocks held, those of departed replicas not yet cleaned up included."""
        return sum(len(replica.held) for replica in (*self._replicas.values(), *self._departed))

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._replicas

    @property
    def num_bytes(self) -> int:
        """Memory of everything held, in the allocator's own sizes."""
        replicas = (*self._replicas.values(), *self._departed)
        tables = sum(map(sys.getsizeof, self._shards))
        tables += sum(sys.getsizeof(replica.held) + sys.getsizeof(replica.expected) for replica in replicas)
        return tables + HASH_BYTES * len(self)

    def num_held(self, replica_id: str) -> int:
        """Blocks a replica holds, those expected left out; 0 for an unknown one."""
        replica = self._replicas.get(replica_id)
        return 0 if replica is None else len(replica.held)

    def is_exact(self, replica_id: str) -> bool:
        """Whether this is the replica's own word, rather than a guess from what was sent to it."""
        replica = self._replicas.get(replica_id)
        return replica is not None and replica.exact

    # Replicas.

    def add(self, replica_id: str, capacity_blocks: int) -> None:
        """Makes room for a replica that can hold `capacity_blocks` routing blocks, mirrored from now on. A known id
        starts anew, empty."""
        self.drop(replica_id)
        if self._free_bits:
            bit = self._free_bits.pop()
        else:
            bit = 1 << self._num_slots
            self._num_slots += 1
        self._replicas[replica_id] = _Replica(replica_id, bit, max(1, capacity_blocks))
        self._by_bit[bit] = replica_id
        self._live |= bit
        self._recount()
        for replica in self._replicas.values():
            self._trim(replica)

    def drop(self, replica_id: str) -> None:
        """Forgets a replica at once: it matches nothing from now on. No-op for an unknown one."""
        replica = self._replicas.pop(replica_id, None)
        if replica is not None:
            self._live &= ~replica.bit
            for block in replica.expected:
                if block not in replica.held:
                    self._unset(replica, block)
            replica.expected.clear()
            self._departed.append(replica)
            self._recount()

    def load(self, replica_id: str, hashes: Sequence[int]) -> None:
        """This is exactly what a replica holds now, least recently used first; it is exact from here on.

        No-op for an unknown replica.
        """
        replica = self._replicas.get(replica_id)
        if replica is None:
            return
        held, replica.held = replica.held, dict.fromkeys(hashes)
        for block in held.keys() - replica.held.keys():
            if block not in replica.expected:
                self._unset(replica, block)
        for block in replica.held.keys() - held.keys():
            self._set(replica, block)
        if replica.expected:
            replica.expected = {block: at for block, at in replica.expected.items() if block not in replica.held}
        replica.exact = True
        self._recount()
        self._trim(replica)

    def doubt(self, replica_id: str) -> None:
        """A replica's word is out of date: from here on it is mirrored, beginning with what it last said and what was
        sent since. No-op for an unknown replica, or one that is mirrored already."""
        replica = self._replicas.get(replica_id)
        if replica is None or not replica.exact:
            return
        replica.exact = False
        self._recount()
        expected, replica.expected = replica.expected, {}
        for block in expected:
            replica.held.pop(block, None)
            replica.held[block] = None
        self._trim(replica)

    # Blocks.

    def insert(self, replica_id: str, hashes: Sequence[int]) -> None:
        """A replica now holds these blocks of one prompt (in prompt order); they become its most recently used.

        The last block counts as the oldest of them, so that eviction takes a prefix from its tail. No-op for an
        unknown replica.
        """
        self._purge()
        replica = self._replicas.get(replica_id)
        if replica is None:
            return
        held, shards, bit, last = replica.held, self._shards, replica.bit, NUM_SHARDS - 1
        for block in reversed(hashes):
            if block in held:
                del held[block]
            else:
                shard = shards[block & last]
                others = shard.get(block)
                shard[block] = bit if others is None else others | bit  # the one bit is shared: 32 bytes saved
            held[block] = None
        if replica.expected:
            for block in hashes:
                replica.expected.pop(block, None)
        self._trim(replica)

    def evict(self, replica_id: str, hashes: Iterable[int]) -> None:
        """A replica no longer holds these blocks. Unknown ones are ignored."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            for block in hashes:
                if block in replica.held:
                    self._remove(replica, block)

    def clear(self, replica_id: str) -> None:
        """A replica emptied its cache; nothing is expected of it either."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            self.add(replica_id, replica.capacity_blocks)
            if replica.exact:
                self.load(replica_id, ())

    def expect(self, replica_id: str, hashes: Sequence[int], until: float) -> None:
        """A prompt of these blocks is on its way to a replica: they match until they are inserted, or until `expire`
        hears a later time than `until`. No-op for an unknown replica."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return
        held, expected = replica.held, replica.expected
        room = self._bound(replica) - len(expected)
        fresh = [block for block in hashes if block not in held]
        if not fresh or len(fresh) > room:
            return
        for block in fresh:
            if block not in expected:
                self._set(replica, block)
            expected[block] = until
        heapq.heappush(self._expiries, (until, next(self._numbers), replica, fresh))

    def expire(self, now: float) -> None:
        """Stops believing in what was expected until `now` or earlier and has not come."""
        while self._expiries and self._expiries[0][0] <= now:
            _, _, replica, hashes = heapq.heappop(self._expiries)
            expected = replica.expected
            for block in hashes:
                if expected.get(block, now + 1.0) <= now:
                    del expected[block]
                    if block not in replica.held:
                        self._unset(replica, block)

    def sent(self, replica_id: str, hashes: Sequence[int], now: float) -> None:
        """A prompt of these blocks was sent to a replica: expected of an exact one, taken for held in a mirror."""
        self.expire(now)
        if self.is_exact(replica_id):
            self.expect(replica_id, hashes, now + EXPECT_S)
        else:
            self.insert(replica_id, hashes)

    def match(self, hashes: Sequence[int]) -> dict[str, int]:
        """Leading blocks of the prompt that each replica holds or is about to, by replica id; a replica without any is
        absent."""
        shards, last = self._shards, NUM_SHARDS - 1
        mask = self._live
        matched: dict[str, int] = {}
        for num_before, block in enumerate(hashes):
            still = mask & shards[block & last].get(block, 0)
            if still != mask:
                if num_before:
                    self._spread(matched, mask ^ still, num_before)
                mask = still
                if not mask:
                    break
        else:
            if hashes:
                self._spread(matched, mask, len(hashes))
        return matched

    def check(self) -> None:
        """Asserts that all directions agree and every bound holds; for tests."""
        rebuilt: dict[int, int] = {}
        for replica in (*self._replicas.values(), *self._departed):
            for block in replica.held.keys() | replica.expected.keys():
                rebuilt[block] = rebuilt.get(block, 0) | replica.bit
        assert rebuilt == {block: mask for shard in self._shards for block, mask in shard.items()}
        assert all(block % NUM_SHARDS == i for i, shard in enumerate(self._shards) for block in shard)
        for replica in self._replicas.values():
            assert len(replica.held) <= self._bound(replica), f"{replica.replica_id} beyond its bound"
            assert len(replica.expected) <= self._bound(replica), f"{replica.replica_id} expects beyond its bound"
            waiting = {block for _, _, of, hashes in self._expiries if of is replica for block in hashes}
            assert replica.expected.keys() <= waiting, "an expectation would never expire"

    # Inside.

    def _recount(self) -> None:
        self.guessed = frozenset(replica.replica_id for replica in self._replicas.values() if not replica.exact)

    def _bound(self, replica: _Replica) -> int:
        share = max(1, self._max_blocks // max(1, len(self._replicas)))
        return share if replica.exact else min(replica.capacity_blocks, share)

    def _trim(self, replica: _Replica) -> None:
        surplus = len(replica.held) - self._bound(replica)
        if surplus > 0:
            for block in list(islice(replica.held, surplus)):
                self._remove(replica, block)

    def _remove(self, replica: _Replica, block: int) -> None:
        del replica.held[block]
        if block not in replica.expected:
            self._unset(replica, block)

    def _set(self, replica: _Replica, block: int) -> None:
        shard = self._shards[block & (NUM_SHARDS - 1)]
        others = shard.get(block)
        shard[block] = replica.bit if others is None else others | replica.bit

    def _unset(self, replica: _Replica, block: int) -> None:
        shard = self._shards[block & (NUM_SHARDS - 1)]
        rest = shard[block] & ~replica.bit
        if rest:
            shard[block] = rest
        else:
            del shard[block]

    def _spread(self, matched: dict[str, int], bits: int, num_blocks: int) -> None:
        """Gives every replica in `bits` its number of blocks."""
        by_bit = self._by_bit
        while bits:
            lowest = bits & -bits
            matched[by_bit[lowest]] = num_blocks
            bits ^= lowest

    def _purge(self) -> None:
        """Cleans up a bounded part of what departed replicas left; a slot is reused only when nothing is left of it."""
        if not self._departed:
            return
        replica = self._departed[-1]
        for block in list(islice(replica.held, PURGE_STEP)):
            self._remove(replica, block)
        if not replica.held:
            self._departed.pop()
            self._free_bits.append(replica.bit)
