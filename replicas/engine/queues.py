"""Where a scheduler keeps its sequences: the waiting ones and the running ones, both by `Sequence.order_key`."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import pairwise

from replicas.engine.order import OrderKey
from replicas.engine.sequence import Sequence

_MIN_STALE = 64


class WaitingQueue:
    """A priority queue, O(log n) an operation, that can lose members from the middle (abort, deadline).

    Removed members stay in the heaps until they surface or outnumber the living; `_members` is the truth.
    """

    def __init__(self) -> None:
        self._members: dict[str, Sequence] = {}
        self._heap: list[tuple[OrderKey, Sequence]] = []
        self._deadlines: list[tuple[float, OrderKey, Sequence]] = []
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, seq: Sequence) -> bool:
        return self._members.get(seq.request_id) is seq

    def push(self, seq: Sequence) -> None:
        """Adds a sequence. A deadline is watched until the first step it runs in."""
        self._members[seq.request_id] = seq
        self.num_tokens += seq.num_tokens
        self._compact()
        heappush(self._heap, (seq.order_key, seq))
        deadline_s = seq.request.deadline_s
        if deadline_s is not None and seq.num_preemptions == 0:
            heappush(self._deadlines, (seq.arrival + deadline_s, seq.order_key, seq))

    def peek(self) -> Sequence | None:
        """The sequence that goes next."""
        while self._heap and self._heap[0][1] not in self:
            heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        """Takes out the sequence that goes next; it may be pushed again (preemption)."""
        seq = self.peek()
        assert seq is not None, "nothing waits"
        heappop(self._heap)
        self._forget(seq)
        return seq

    def remove(self, seq: Sequence) -> None:
        """Takes a member out for good, from wherever it is."""
        self._forget(seq)

    def expired(self, now: float) -> list[Sequence]:
        """Members whose deadline has passed, each at most once; they stay until removed."""
        late: list[Sequence] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            seq = heappop(self._deadlines)[2]
            if seq in self and seq.num_preemptions == 0:
                late.append(seq)
        return late

    def check(self) -> None:
        """Asserts that counts agree and that every member can be found."""
        assert self.num_tokens == sum(seq.num_tokens for seq in self._members.values())
        in_heap = [seq for _, seq in self._heap if seq in self]
        assert len(in_heap) == len(self._members), "a member is missing from the heap, or there twice"

    def _forget(self, seq: Sequence) -> None:
        del self._members[seq.request_id]
        self.num_tokens -= seq.num_tokens

    def _compact(self) -> None:
        """Keeps the heaps within twice the members (amortised O(1))."""
        limit = 2 * len(self._members) + _MIN_STALE
        if len(self._heap) > limit:
            self._heap = [entry for entry in self._heap if entry[1] in self]
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
