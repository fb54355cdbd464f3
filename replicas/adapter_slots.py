"""A replica's adapter slots: which adapters hold them, which are in use, which one goes when another must come in.

absent ── claim ──► loading ── loaded ──► resident ── claim of another, while not in use ──► absent
                       └── failed ──► absent
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from routing.decay import DecayedCounts

HALF_LIFE_S = 300.0
"""How fast past uses fade. Short, it is LRU; long, it is LFU, which keeps what is hot through a flood of rare ones."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A slot for one load; the `evicted` had it, and what else it needs, before and must be unloaded first."""

    adapter_id: str
    evicted: tuple[str, ...] = ()


class AdapterSlots:
    """`num_slots` places, for adapters whose ranks sum to at most `max_ranks`. Synchronous; time is passed in. One in
    use (pinned) or being loaded is never evicted.

    Among the others the one used least goes, where uses fade with time (LRFU, Lee et al. 2001). Uses of absent adapters
    are remembered as well, so that one that comes back is known for what it is.
    """

    def __init__(self, num_slots: int, half_life_s: float = HALF_LIFE_S, max_ranks: float = inf) -> None:
        self.num_slots = num_slots
        self.max_ranks = max_ranks
        self._pins: dict[str, int] = {}  # resident → requests that use it
        self._loading: set[str] = set()
        self._ranks: dict[str, int] = {}  # of all that have a slot
        self._uses = DecayedCounts(half_life_s)
        self._order: tuple[str, ...] | None = None

    @property
    def resident(self) -> tuple[str, ...]:
        """Usable now."""
        if self._order is None:
            self._order = tuple(self._pins)
        return self._order

    @property
    def has_room(self) -> bool:
        """Whether a claim would succeed, but for a rank that is larger than what would be free."""
        return self._fits(1, sum(self._ranks.values()), len(self._ranks)) or 0 in self._pins.values()

    def is_resident(self, adapter_id: str) -> bool:
        return adapter_id in self._pins

    def is_in_use(self, adapter_id: str) -> bool:
        return self._pins.get(adapter_id, 0) > 0

    def rank_of(self, adapter_id: str) -> int:
        """Of one that has a slot."""
        return self._ranks[adapter_id]

    def used(self, adapter_id: str, now: float) -> None:
        """Somebody asked for it, whether it is here or not."""
        self._uses.add(adapter_id, 1.0, now)

    def claim(self, adapter_id: str, rank: int = 1) -> Claim | None:
        """A slot to load an absent adapter into; None while those in use leave no room."""
        assert adapter_id not in self._ranks, f"{adapter_id} has a slot"
        evicted = self._evictable(rank)
        if evicted is None:
            return None
        for name in evicted:
            del self._pins[name], self._ranks[name]
            self._order = None
        self._loading.add(adapter_id)
        self._ranks[adapter_id] = rank
        return Claim(adapter_id, evicted)

    def loaded(self, adapter_id: str) -> None:
        """It can be used from now on."""
        self._loading.remove(adapter_id)
        self._pins[adapter_id] = 0
        self._order = None

    def failed(self, adapter_id: str) -> None:
        """It could not be loaded: its slot is free."""
        self._loading.remove(adapter_id)
        del self._ranks[adapter_id]

    def pin(self, adapter_id: str) -> None:
        """One request more uses it."""
        self._pins[adapter_id] += 1

    def unpin(self, adapter_id: str) -> None:
        """One request fewer does."""
        assert self._pins[adapter_id] > 0, f"{adapter_id} is not in use"
        self._pins[adapter_id] -= 1

    def drop(self, adapter_id: str) -> None:
        """Takes an idle resident adapter out."""
        assert self._pins[adapter_id] == 0, f"{adapter_id} is in use"
        del self._pins[adapter_id], self._ranks[adapter_id]
        self._order = None

    def check(self) -> None:
        """Asserts every invariant; for tests."""
        assert len(self._pins) + len(self._loading) <= self.num_slots
        assert self._ranks.keys() == self._pins.keys() | self._loading
        assert sum(self._ranks.values()) <= self.max_ranks
        assert not self._loading & self._pins.keys()
        assert all(num_pins >= 0 for num_pins in self._pins.values())

    def _evictable(self, rank: int) -> tuple[str, ...] | None:
        """Who must go for an adapter of this rank, the least used first; None when that is not enough."""
        num_ranks, num_taken = sum(self._ranks.values()), len(self._ranks)
        evicted: list[str] = []
        idle = [name for name, num_pins in self._pins.items() if not num_pins]
        waiting = sorted(idle, key=self._uses.weight, reverse=True)
        while not self._fits(rank, num_ranks, num_taken):
            if not waiting:
                return None
            evicted.append(waiting.pop())
            num_ranks -= self._ranks[evicted[-1]]
            num_taken -= 1
        return tuple(evicted)

    def _fits(self, rank: int, num_ranks: int, num_taken: int) -> bool:
        return num_taken < self.num_slots and num_ranks + rank <= self.max_ranks
