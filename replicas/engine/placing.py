"""Blocks for those that are admitted: their cached prefix, and the promise of all the rest.

Copy-on-write happens in one place: a prompt found whole in the cache must still compute its last token, to have logits,
and that token's KV goes into a copy of the last block: cached blocks never change.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from replicas.engine.block_pool import BlockPool
from replicas.engine.sequence import PlanItem, Sequence


@dataclass(slots=True)
class Draft:
    """A plan in the making. `promised`: blocks that running sequences still need for tokens they already have."""

    budget: int
    items: dict[str, PlanItem] = field(default_factory=dict)
    copies: dict[str, tuple[int, int]] = field(default_factory=dict)
    promised: int = 0


class Placing:
    """Gives waiting sequences their first blocks."""

    def __init__(self, pool: BlockPool, prefix_caching: bool) -> None:
        self.num_cached_tokens = 0
        self.copy_sources: list[int] = []  # held until the copies of the last plan are made
        self._pool = pool
        self._caching = prefix_caching

    def place(self, draft: Draft, seq: Sequence, num_running: int) -> bool:
        """Gives a waiting sequence its cached prefix, when the blocks of all its tokens are there."""
        pool = self._pool
        # One block to grow into for each running sequence, so that admitting is not followed by preempting.
        reserved = draft.promised + num_running
        if num_running and pool.num_free <= reserved:
            return False
        matched = self._match(seq)
        num_computed = min(len(matched) * pool.block_size, seq.num_tokens - 1)
        copies_last = num_computed < len(matched) * pool.block_size
        missing = blocks_for(seq.num_tokens, pool.block_size) - len(matched)
        if num_running and missing + copies_last + pool.num_idle(matched) + reserved > pool.num_free:
            return False
        pool.acquire(matched)
        seq.block_ids = matched
        seq.num_registered = len(matched)
        if copies_last:
            source = matched.pop()
            matched.extend(pool.allocate(1))
            seq.num_registered -= 1
            self.copy_sources.append(source)
            draft.copies[seq.request_id] = (source, matched[-1])
        seq.num_computed = num_computed
        draft.promised += missing
        if seq.num_cached is None:
            seq.num_cached = min(num_computed, seq.num_prompt)
            self.num_cached_tokens += seq.num_cached
        return True

    def release_copies(self) -> None:
        """The copies of the last plan are made."""
        sources, self.copy_sources = self.copy_sources, []
        for block_id in sources:
            self._pool.free((block_id,))

    def _match(self, seq: Sequence) -> list[int]:
        if not self._caching or seq.wants_prompt_logprobs:
            return []
        return self._pool.match(seq.namespace, seq.tokens)


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
