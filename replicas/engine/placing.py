"""Blocks for those that are admitted: their cached prefix, and the promise of the rest. Drafts get what is left.

Copy-on-write happens in one place: a prompt found whole in the cache must still compute its last token, to have logits,
and that token's KV goes into a copy of the last block: cached blocks never change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from replicas.engine.block_pool import BlockPool
from replicas.engine.drafts import Drafts
from replicas.engine.sequence import PlanItem, Sequence


@dataclass(slots=True)
class Outline:
    """A plan in the making. `promised`: blocks that running sequences still need for tokens they already have.
    `kept`: tokens of the budget kept back for drafts."""

    budget: int
    items: dict[str, PlanItem] = field(default_factory=dict)
    copies: dict[str, tuple[int, int]] = field(default_factory=dict)
    promised: int = 0
    kept: int = 0

    def keep(self, num_drafts: int) -> None:
        """Keeps budget back for drafts, at most half of it: prompts go on as well."""
        self.kept = min(num_drafts, self.budget // 2)
        self.budget -= self.kept


class Placing:
    """Gives waiting sequences their first blocks."""

    def __init__(self, pool: BlockPool, prefix_caching: bool) -> None:
        self.num_cached_tokens = 0
        self.copy_sources: list[int] = []  # held until the copies of the last plan are made
        self._pool = pool
        self._caching = prefix_caching

    def place(self, outline: Outline, seq: Sequence, num_running: int) -> bool:
        """Gives a waiting sequence its cached prefix, when the blocks of all its tokens are there."""
        pool = self._pool
        # One block to grow into for each running sequence, so that admitting is not followed by preempting.
        reserved = outline.promised + num_running
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
            outline.copies[seq.request_id] = (source, matched[-1])
        seq.num_computed = num_computed
        outline.promised += missing
        if seq.num_cached is None:
            seq.num_cached = min(num_computed, seq.num_prompt)
            self.num_cached_tokens += seq.num_cached
        return True

    def extend(self, outline: Outline, drafts: Mapping[str, Drafts], max_len: int) -> None:
        """Adds drafts to the items that sample, as far as budget and free blocks go: they take nothing from anybody."""
        outline.budget += outline.kept
        outline.kept = 0
        for name, wanted in drafts.items():
            item = outline.items.get(name)
            if item is None or item.num_tokens > 1 or not item.samples:
                continue  # it was preempted, and perhaps admitted again
            seq, end, size = item.seq, item.start + item.num_tokens, self._pool.block_size
            spare = max(0, self._pool.num_free - outline.promised)
            room = (len(seq.block_ids) + spare) * size - end
            fitting = wanted.cut(min(outline.budget, room), _max_depth(seq, max_len))
            seq.block_ids.extend(self._pool.allocate(max(0, blocks_for(end + len(fitting), size) - len(seq.block_ids))))
            outline.items[name] = replace(item, num_tokens=item.num_tokens + len(fitting), drafts=fitting)
            outline.budget -= len(fitting)

    def shrink(self, seq: Sequence) -> None:
        """Gives back the blocks that only rejected drafts were in."""
        num_kept = blocks_for(seq.num_tokens, self._pool.block_size)
        self._pool.free(seq.block_ids[num_kept:])
        del seq.block_ids[num_kept:]

    def release_copies(self) -> None:
        """The copies of the last plan are made."""
        sources, self.copy_sources = self.copy_sources, []
        for block_id in sources:
            self._pool.free((block_id,))

    def _match(self, seq: Sequence) -> list[int]:
        if not self._caching or seq.wants_prompt_logprobs:
            return []
        return self._pool.match(seq.namespace, seq.tokens)


def _max_depth(seq: Sequence, max_len: int) -> int:
    """Drafts that can be of use: with all of them confirmed and one more token the sequence is at its limit."""
    return max(0, min(seq.request.sampling.max_tokens - seq.num_output, max_len - seq.num_tokens) - 1)


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
