"""What loading adapters took: the mean that waits are reckoned with, and counts for whoever watches."""

from __future__ import annotations

from bisect import bisect_left

from replicas.contract import ADAPTER_LOAD_BUCKETS_S, AdapterLoadStats

REFERENCE_RANK = 8
_DECAY = 0.9


class LoadTimes:
    """Seconds a load takes for each unit of rank: a quotient of decayed sums, so that outliers count by their size."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._ranks = 0.0

    @property
    def known(self) -> bool:
        """Whether anything has been loaded yet."""
        return self._ranks > 0

    def observe(self, rank: int, seconds: float) -> None:
        self._seconds = _DECAY * self._seconds + seconds
        self._ranks = _DECAY * self._ranks + rank

    def estimate_s(self, rank: int = REFERENCE_RANK) -> float:
        """0 while nothing has been loaded yet."""
        return self._seconds / self._ranks * rank if self._ranks else 0.0


class LoadCounts:
    """`stats` is made anew only when something has changed."""

    def __init__(self) -> None:
        self.stats: AdapterLoadStats | None = None
        self._seconds = 0.0
        self._buckets = [0] * (len(ADAPTER_LOAD_BUCKETS_S) + 1)
        self._num_failed = 0
        self._num_evicted = 0

    def loaded(self, seconds: float) -> None:
        self._seconds += seconds
        self._buckets[bisect_left(ADAPTER_LOAD_BUCKETS_S, seconds)] += 1
        self._changed()

    def failed(self) -> None:
        self._num_failed += 1
        self._changed()

    def evicted(self, num_adapters: int) -> None:
        if num_adapters:
            self._num_evicted += num_adapters
            self._changed()

    def _changed(self) -> None:
        self.stats = AdapterLoadStats(self._seconds, tuple(self._buckets), self._num_failed, self._num_evicted)
