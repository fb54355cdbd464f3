"""A replica's KV cache, counted in tokens, its prefix cache in the trace's blocks.

    capacity = used blocks (refs > 0, shared) + idle blocks (evictable, least recently used first) + private + free

private: what running requests hold beside cached blocks: blocks not computed yet, and room for their answers, which is
reserved whole at admission (so nothing is ever preempted). A table is released last block first: tails are evicted
first, as in `replicas.engine.block_pool`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeAlias

KvLog: TypeAlias = Callable[[str, tuple[int, ...]], None]
"""Called with ("stored" | "evicted", hashes in prompt order) when somebody reads KV events."""


def nothing(kind: str, hashes: tuple[int, ...]) -> None:
    """Where nobody reads KV events."""


class PagedCache:
    """Every operation is O(1) a block. `capacity` and `private` in tokens."""

    def __init__(self, capacity: int, block_tokens: int, log: KvLog = nothing) -> None:
        self.capacity = capacity
        self.block_tokens = block_tokens
        self.private = 0
        self.num_evicted = 0
        self._refs: dict[int, int] = {}
        self._idle: dict[int, None] = {}
        self._log = log

    @property
    def num_free_tokens(self) -> int:
        """Tokens that can be had: never used, or idle in the cache."""
        return self.capacity - self.private - len(self._refs) * self.block_tokens

    def __contains__(self, block: int) -> bool:
        return block in self._refs or block in self._idle

    def __len__(self) -> int:
        """Blocks cached, used or idle."""
        return len(self._refs) + len(self._idle)

    def match(self, blocks: Sequence[int]) -> int:
        """How many leading blocks are cached.

        By bisection: whatever is cached, all before it in its prompt is too. A table holds or releases its blocks
        together, tails first, so no block ever becomes older than those that follow it.
        """
        refs, idle = self._refs, self._idle
        low, high = 0, len(blocks)
        while low < high:
            middle = (low + high + 1) // 2
            block = blocks[middle - 1]
            if block in refs or block in idle:
                low = middle
            else:
                high = middle - 1
        return low

    def take(self, blocks: Sequence[int], num_matched: int, num_private: int) -> bool:
        """Holds the first `num_matched` blocks (all cached) and `num_private` tokens, or nothing: then False."""
        idle, refs = self._idle, self._refs
        matched = blocks if num_matched == len(blocks) else blocks[:num_matched]
        num_idle = sum(map(idle.__contains__, matched))
        size = self.block_tokens
        if num_private + num_idle * size > self.capacity - self.private - len(refs) * size:
            return False
        for block in matched:
            if block in refs:
                refs[block] += 1
            else:
                del idle[block]
                refs[block] = 1
        self.private += num_private
        surplus = len(idle) * size + self.private + len(refs) * size - self.capacity
        if surplus > 0:
            self._evict(-(-surplus // size))
        return True

    def store(self, blocks: Sequence[int], begin: int, end: int) -> None:
        """Private blocks `begin … end - 1` of a table are computed: others may use them from now on."""
        refs, idle = self._refs, self._idle
        new = []
        for block in blocks[begin:end]:
            if block in refs:
                refs[block] += 1
            else:
                if block in idle:
                    del idle[block]
                else:
                    new.append(block)
                refs[block] = 1
        self.private -= (end - begin) * self.block_tokens
        if new:
            self._log("stored", tuple(new))

    def release(self, blocks: Sequence[int], num_private: int) -> None:
        """Gives back a table, its blocks all stored, and what was private."""
        refs, idle = self._refs, self._idle
        for block in reversed(blocks):
            left = refs[block] - 1
            if left:
                refs[block] = left
            else:
                del refs[block]
                idle[block] = None
        self.private -= num_private

    def check(self) -> None:
        """Asserts the bounds; for tests."""
        assert not self._refs.keys() & self._idle.keys()
        assert self.private >= 0
        held = self.private + (len(self._refs) + len(self._idle)) * self.block_tokens
        assert held <= self.capacity, f"{held=} {self.capacity=}"

    def _evict(self, num: int) -> None:
        idle = self._idle
        victims = tuple(islice(idle, num))
        for block in victims:
            del idle[block]
        self.num_evicted += len(victims)
        self._log("evicted", victims)
