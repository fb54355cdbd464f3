"""Prompts that were sent to replicas and are not confirmed yet: which blocks, by whom, and until when to believe in it.

    masks        block hash → bit mask of the replicas (by slot) that are about to hold it
    per replica  block hash → when to stop believing

A replica's own word that it holds a block makes the block certain and takes it out of here; without it, it goes when
its time is over.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice


class Expectations:
    """Small beside an index: what was sent in the last seconds. Replicas are bits of a mask."""

    def __init__(self) -> None:
        self.masks: dict[int, int] = {}
        self._until: dict[int, dict[int, float]] = {}  # by bit
        self._expiries: list[tuple[float, int, int, Sequence[int]]] = []
        self._numbers = count()

    @property
    def num_bytes(self) -> int:
        """Memory of the tables."""
        return sys.getsizeof(self.masks) + sum(map(sys.getsizeof, self._until.values()))

    def of(self, bit: int) -> Iterable[int]:
        """The blocks expected of a replica, in the order in which they were sent."""
        return self._until.get(bit, ())

    def num(self, bit: int) -> int:
        """How many blocks are expected of a replica."""
        return len(self._until.get(bit, ()))

    def walk(self, hashes: Sequence[int], start: int, mask: int) -> Iterator[tuple[int, int]]:
        """(number of blocks, replicas of `mask` of which so many are expected, the first `start` taken for granted)."""
        before: int | None = None
        for num, found in enumerate(map(self.masks.get, islice(hashes, start, None)), start):
            if found is before and found is not None:  # most often: the blocks of one prompt, sent to one replica
                continue
            before = found
            still = mask & (found or 0)
            if still != mask:
                yield num, mask ^ still
                mask = still
                if not mask:
                    return
        yield len(hashes), mask

    def add(self, bit: int, hashes: Sequence[int], until: float) -> None:
        """These blocks are on their way to a replica."""
        masks, mine = self.masks, self._until.setdefault(bit, {})
        if masks.keys().isdisjoint(hashes):  # as most often
            masks.update(dict.fromkeys(hashes, bit))
        else:
            for block in hashes:
                masks[block] = masks.get(block, 0) | bit
        mine.update(dict.fromkeys(hashes, until))
        heapq.heappush(self._expiries, (until, next(self._numbers), bit, hashes))

    def confirm(self, bit: int, hashes: Iterable[int]) -> None:
        """A replica holds these blocks: they are no longer expected of it."""
        mine = self._until.get(bit)
        if mine:
            for block in hashes:
                if mine.pop(block, None) is not None:
                    self._unset(bit, block)

    def drop(self, bit: int) -> None:
        """Nothing is expected of a replica any more."""
        for block in self._until.pop(bit, ()):
            self._unset(bit, block)

    def expire(self, now: float) -> bool:
        """Gives up what was expected until `now` or earlier; whether there was any."""
        expiries = self._expiries
        if not expiries or expiries[0][0] > now:
            return False
        while expiries and expiries[0][0] <= now:
            _, _, bit, hashes = heapq.heappop(expiries)
            mine = self._until.get(bit)
            if mine:
                for block in hashes:
                    if mine.get(block, now + 1.0) <= now:
                        del mine[block]
                        self._unset(bit, block)
        return True

    def check(self) -> None:
        """Asserts that all directions agree, and that everything expires; for tests."""
        rebuilt: dict[int, int] = {}
        for bit, mine in self._until.items():
            for block in mine:
                rebuilt[block] = rebuilt.get(block, 0) | bit
            waiting = {(block, until) for until, _, of, hashes in self._expiries if of == bit for block in hashes}
            assert mine.items() <= waiting, "an expectation would never expire"
        assert rebuilt == self.masks

    def _unset(self, bit: int, block: int) -> None:
        rest = self.masks[block] & ~bit
        if rest:
            self.masks[block] = rest
        else:
            del self.masks[block]
