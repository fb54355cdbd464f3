"""Who probably holds which prefix block: a mirror of each replica's cache, for all replicas in one structure.

    holders      block hash → bit mask of the replicas (by slot) that hold it
    per replica  its hashes in order of last use, oldest first (what a cache with LRU eviction would hold)

One walk along a prompt's hashes then answers for every replica at once: the mask of those that hold all blocks so far
only ever loses bits. The mirror is fed by what this ingress routed; `insert`, `evict` and `clear` are also what exact
KV events need.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

PURGE_STEP = 512
"""Entries of departed replicas that one insertion cleans up: a death costs no pause."""


@dataclass(slots=True, eq=False)
class _Mirror:
    """One replica's blocks, least recently used first. `bit` = 1 << slot."""

    replica_id: str
    bit: int
    capacity_blocks: int
    blocks: dict[int, None] = field(default_factory=dict)


class PrefixIndex:
    """A bounded map from block hash to replicas.

    All mirrors together hold at most about `max_blocks` entries: each replica gets its cache's size or an equal share,
    whichever is smaller.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._holders: dict[int, int] = {}
        self._mirrors: dict[str, _Mirror] = {}
        self._live = 0
        self._departed: list[_Mirror] = []
        self._free_bits: list[int] = []
        self._num_slots = 0

    def __len__(self) -> int:
        """Entries held, those of departed replicas not yet cleaned up included."""
        return sum(len(m.blocks) for m in (*self._mirrors.values(), *self._departed))

    def add(self, replica_id: str, capacity_blocks: int) -> None:
        """Makes room for a replica that can hold `capacity_blocks` routing blocks. A known id starts anew, empty."""
        self.drop(replica_id)
        if self._free_bits:
            bit = self._free_bits.pop()
        else:
            bit = 1 << self._num_slots
            self._num_slots += 1
        self._mirrors[replica_id] = _Mirror(replica_id, bit, max(1, capacity_blocks))
        self._live |= bit
        for mirror in self._mirrors.values():
            self._trim(mirror)

    def drop(self, replica_id: str) -> None:
        """Forgets a replica at once: it matches nothing from now on. No-op for an unknown one."""
        mirror = self._mirrors.pop(replica_id, None)
        if mirror is not None:
            self._live &= ~mirror.bit
            self._departed.append(mirror)

    def insert(self, replica_id: str, hashes: Sequence[int]) -> None:
        """A replica now holds these blocks of one prompt (in prompt order); they become its most recently used.

        The last block counts as the oldest of them, so that eviction takes a prefix from its tail. No-op for an
        unknown replica.
        """
        self._purge()
        mirror = self._mirrors.get(replica_id)
        if mirror is None:
            return
        blocks, holders, bit = mirror.blocks, self._holders, mirror.bit
        for block in reversed(hashes):
            if block in blocks:
                del blocks[block]
            else:
                holders[block] = holders.get(block, 0) | bit
            blocks[block] = None
        self._trim(mirror)

    def evict(self, replica_id: str, hashes: Iterable[int]) -> None:
        """A replica no longer holds these blocks. Unknown ones are ignored."""
        mirror = self._mirrors.get(replica_id)
        if mirror is not None:
            for block in hashes:
                if block in mirror.blocks:
                    self._remove(mirror, block)

    def clear(self, replica_id: str) -> None:
        """A replica emptied its cache."""
        mirror = self._mirrors.get(replica_id)
        if mirror is not None:
            self.add(replica_id, mirror.capacity_blocks)

    def match(self, hashes: Sequence[int]) -> dict[str, int]:
        """Leading blocks of the prompt that each replica holds, by replica id; a replica without any is absent."""
        holders = self._holders
        mask = self._live
        matched: dict[int, int] = {}
        for num_before, block in enumerate(hashes):
            still = mask & holders.get(block, 0)
            if still != mask:
                if num_before:
                    _spread(matched, mask & ~still, num_before)
                mask = still
                if not mask:
                    break
        else:
            if hashes:
                _spread(matched, mask, len(hashes))
        if not matched:
            return {}
        return {m.replica_id: matched[m.bit] for m in self._mirrors.values() if m.bit in matched}

    def check(self) -> None:
        """Asserts that both directions agree and every bound holds; for tests."""
        rebuilt: dict[int, int] = {}
        for mirror in (*self._mirrors.values(), *self._departed):
            for block in mirror.blocks:
                rebuilt[block] = rebuilt.get(block, 0) | mirror.bit
        assert rebuilt == self._holders
        for mirror in self._mirrors.values():
            assert len(mirror.blocks) <= self._bound(mirror), f"{mirror.replica_id} beyond its bound"

    def _bound(self, mirror: _Mirror) -> int:
        return min(mirror.capacity_blocks, max(1, self._max_blocks // len(self._mirrors)))

    def _trim(self, mirror: _Mirror) -> None:
        surplus = len(mirror.blocks) - self._bound(mirror)
        if surplus > 0:
            for block in list(islice(mirror.blocks, surplus)):
                self._remove(mirror, block)

    def _remove(self, mirror: _Mirror, block: int) -> None:
        del mirror.blocks[block]
        rest = self._holders[block] & ~mirror.bit
        if rest:
            self._holders[block] = rest
        else:
            del self._holders[block]

    def _purge(self) -> None:
        """Cleans up a bounded part of what departed replicas left; a slot is reused only when nothing is left of it."""
        if not self._departed:
            return
        mirror = self._departed[-1]
        for block in list(islice(mirror.blocks, PURGE_STEP)):
            self._remove(mirror, block)
        if not mirror.blocks:
            self._departed.pop()
            self._free_bits.append(mirror.bit)


def _spread(matched: dict[int, int], bits: int, num_blocks: int) -> None:
    """Gives every replica in `bits` its number of blocks."""
    while bits:
        lowest = bits & -bits
        matched[lowest] = num_blocks
        bits ^= lowest
