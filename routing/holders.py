"""Which replicas hold a block: block hash → bit mask of replicas, for millions of blocks.

A look-up in a table that large is a walk through main memory (0.6 µs a block, 10 times what it takes in the processor's
caches), so a prompt's blocks are not looked up one by one where that can be helped. Caches evict a prefix from its
tail, and a replica without gaps holds every block before one that it holds: `ends` finds the ends of what such replicas
hold by bisection, in steps that grow with the logarithm of the prompt. `walk` is for the others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

NUM_SHARDS = 16
"""A dictionary is rebuilt in one go as it grows and churns: 0.7 s with 4 million entries. Sixteen small ones pause for
a sixteenth of that; more of them would cost more cache misses than they save."""

_LAST = NUM_SHARDS - 1


class Holders:
    """Masks by block. A replica is one bit of a mask."""

    def __init__(self) -> None:
        self._shards: list[dict[int, int]] = [{} for _ in range(NUM_SHARDS)]

    @property
    def num_bytes(self) -> int:
        """Memory of the tables."""
        return sum(map(sys.getsizeof, self._shards))

    def add(self, bit: int, hashes: Iterable[int]) -> None:
        """The replica holds these blocks now."""
        shards = self._shards
        for block in hashes:
            shard = shards[block & _LAST]
            others = shard.get(block)
            shard[block] = bit if others is None else others | bit  # the one bit is shared: 32 bytes saved

    def remove(self, bit: int, hashes: Iterable[int]) -> None:
        """The replica holds none of these blocks any more; it held all of them."""
        shards = self._shards
        for block in hashes:
            shard = shards[block & _LAST]
            others = shard[block] ^ bit
            if others:
                shard[block] = others
            else:
                del shard[block]

    def ends(self, hashes: Sequence[int], mask: int) -> list[tuple[int, int]]:
        """(number of the prompt's leading blocks, replicas of `mask` that hold so many); none of them has gaps.

        `hashes` is not empty.
        """
        shards = self._shards
        block = hashes[0]
        warm = mask & shards[block & _LAST].get(block, 0)
        ends = [(0, mask ^ warm)] if warm != mask else []
        between = [(1, len(hashes), warm)] if warm else []
        while between:
            low, high, mask = between.pop()  # all of them hold `low` blocks, none of them more than `high`
            while low < high:
                middle = (low + high + 1) // 2
                block = hashes[middle - 1]
                have = mask & shards[block & _LAST].get(block, 0)
                if not have:
                    high = middle - 1
                    continue
                if have != mask:
                    between.append((low, middle - 1, mask ^ have))
                    mask = have
                low = middle
            ends.append((low, mask))
        return ends

    def walk(self, hashes: Sequence[int], mask: int, more: Mapping[int, int]) -> Iterator[tuple[int, int]]:
        """The same of any replicas, block by block. `more`: masks of what counts as held besides."""
        shards = self._shards
        for num, block in enumerate(hashes):
            if not mask:
                return
            still = mask & (shards[block & _LAST].get(block, 0) | more.get(block, 0))
            if still != mask:
                yield num, mask ^ still
                mask = still
        if mask:
            yield len(hashes), mask

    def check(self, expected: Mapping[int, int]) -> None:
        """Asserts that these are the masks, each in its shard; for tests."""
        assert {block: mask for shard in self._shards for block, mask in shard.items()} == expected
        assert all(block % NUM_SHARDS == i for i, shard in enumerate(self._shards) for block in shard)
