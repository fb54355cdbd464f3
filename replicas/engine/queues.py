"""Where a scheduler keeps its sequences: the waiting ones and the running ones, both by `Sequence.order_key`."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import count, islice, pairwise
from typing import TypeAlias

from replicas.engine.order import OrderKey
from replicas.engine.sequence import Sequence

_MIN_STALE = 64

_Entry: TypeAlias = tuple[OrderKey, int, Sequence]
"""(key, number of the entry, sequence)."""


class WaitingQueue:
    """A priority queue, O(log n) an operation, whose members may leave (abort, deadline) or move in the middle.

    What has left or moved stays in the heaps until it surfaces or outnumbers the living; `_members` is the truth.
    """

    def __init__(self) -> None:
        self._members: OrderedDict[str, _Entry] = OrderedDict()
        self._heap: list[_Entry] = []
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, seq: Sequence) -> bool:
        entry = self._members.get(seq.request_id)
        return entry is not None and entry[2] is seq

    def __iter__(self) -> Iterator[Sequence]:
        """Every member, in no useful order."""
        return (entry[2] for entry in self._members.values())

    def push(self, seq: Sequence) -> None:
        """Adds a sequence. A deadline is watched until the first step it runs in."""
        self.move(seq)
        deadline_s = seq.request.deadline_s
        if deadline_s is not None and seq.num_preemptions == 0:
            heappush(self._deadlines, (seq.arrival + deadline_s, next(self._numbers), seq))

    def move(self, seq: Sequence) -> None:
        """Puts a sequence where its key says now."""
        entry = (seq.order_key, next(self._numbers), seq)
        self._members[seq.request_id] = entry
        self._compact()
        heappush(self._heap, entry)

    def peek(self) -> Sequence | None:
        """The sequence that goes next."""
        while self._heap and not self._is_current(self._heap[0]):
            heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def in_turn(self, num: int) -> list[Sequence]:
        """The next so many members, so that in time everyone has its turn."""
        taken = list(islice(self, num))
        for seq in taken:
            self._members.move_to_end(seq.request_id)
        return taken

    def pop(self) -> Sequence:
        """Takes out the sequence that goes next; it may be pushed again (preemption)."""
        seq = self.peek()
        assert seq is not None, "nothing waits"
        heappop(self._heap)
        del self._members[seq.request_id]
        return seq

    def remove(self, seq: Sequence) -> None:
        """Takes a member out for good, from wherever it is."""
        del self._members[seq.request_id]

    def expired(self, now: float) -> list[Sequence]:
        """Members whose deadline has passed, each at most once; they stay until removed."""
        late: list[Sequence] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            seq = heappop(self._deadlines)[2]
            if seq in self and seq.num_preemptions == 0:
                late.append(seq)
        return late

    def check(self) -> None:
        """Asserts that every member can be found, at its place."""
        in_heap = [entry for entry in self._heap if self._is_current(entry)]
        assert len(in_heap) == len(self._members), "a member is missing from the heap, or there twice"
        assert all(key == seq.order_key for key, _, seq in in_heap), "a key has changed, and nobody was told"

    def _is_current(self, entry: _Entry) -> bool:
        return self._members.get(entry[2].request_id) is entry

    def _compact(self) -> None:
        """Keeps the heaps within twice the members (amortised O(1))."""
        limit = 2 * len(self._members) + _MIN_STALE
        if len(self._heap) > limit:
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapify(self._heap)
        if len(self._deadlines) > limit:
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self]
            heapify(self._deadlines)


class RunningSet:
    """Running sequences, sorted. A few hundred at most: a sorted list, O(log n) to find."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __contains__(self, seq: Sequence) -> bool:
        index = bisect_left(self._sequences, seq.order_key, key=_order_key)
        return index < len(self._sequences) and self._sequences[index] is seq

    @property
    def last(self) -> Sequence:
        """The one that is last in the order: the first to be preempted."""
        return self._sequences[-1]

    def add(self, seq: Sequence) -> None:
        insort(self._sequences, seq, key=_order_key)

    def remove(self, seq: Sequence) -> None:
        assert seq in self, f"{seq.request_id} is not running"
        del self._sequences[bisect_left(self._sequences, seq.order_key, key=_order_key)]

    def check(self) -> None:
        """Asserts the order."""
        keys = [seq.order_key for seq in self._sequences]
        assert all(before < after for before, after in pairwise(keys)), f"{keys=}"


def _order_key(seq: Sequence) -> OrderKey:
    return seq.order_key
