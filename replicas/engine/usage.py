"""How well the allocated KV is used: what paging is for (vLLM's claim: waste only in each sequence's last block)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from replicas.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class KvUse:
    """Token slots in the blocks that running sequences hold, and how many of them hold a computed token.

    A block shared by several sequences counts once.
    """

    num_allocated_slots: int = 0
    num_filled_slots: int = 0

    @property
    def share(self) -> float:
        """Filled ÷ allocated; 1 when nothing is allocated."""
        return self.num_filled_slots / self.num_allocated_slots if self.num_allocated_slots else 1.0

    def __add__(self, other: KvUse) -> KvUse:
        return KvUse(
            self.num_allocated_slots + other.num_allocated_slots, self.num_filled_slots + other.num_filled_slots
        )


def kv_use(sequences: Iterable[Sequence], block_size: int) -> KvUse:
    """Measures the block tables between two steps. O(blocks): for tests and benchmarks."""
    filled: dict[int, int] = {}
    for seq in sequences:
        for i, block_id in enumerate(seq.block_ids):
            in_block = max(0, min(block_size, seq.num_computed - i * block_size))
            filled[block_id] = max(filled.get(block_id, 0), in_block)
    return KvUse(len(filled) * block_size, sum(filled.values()))
