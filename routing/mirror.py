"""What this router sent where: all that a rule without events knows of the replicas' caches.

    sent      block hash → bit mask of the replicas (by slot) it was sent to
    a replica its blocks in order of last use, oldest first; beyond its bound the oldest are forgotten

The trees of other routers (`routing.baselines.cache_aware`, `prefix_affinity`) in blocks instead of characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice


@dataclass(slots=True, eq=False)
class _Tree:
    """One replica's blocks, least recently used first. `bit` = 1 << slot."""

    replica_id: str
    bit: int
    max_blocks: int
    blocks: dict[int, None] = field(default_factory=dict)


class Mirror:
    """Per replica the blocks sent to it, the least recently used forgotten beyond its bound."""

    def __init__(self) -> None:
        self._sent: dict[int, int] = {}
        self._trees: dict[str, _Tree] = {}

    def __contains__(self, replica_id: str) -> bool:
        return replica_id in self._trees

    def add(self, replica_id: str, max_blocks: int) -> None:
        """Begins with a replica, of which at most `max_blocks` are remembered. A known id starts anew, empty."""
        self.drop(replica_id)
        used = {tree.bit for tree in self._trees.values()}
        bit = next(1 << slot for slot in range(len(used) + 1) if 1 << slot not in used)
        self._trees[replica_id] = _Tree(replica_id, bit, max(1, max_blocks))

    def drop(self, replica_id: str) -> None:
        """Forgets a replica. No-op for an unknown one."""
        tree = self._trees.get(replica_id)
        if tree is not None:
            for block in list(tree.blocks):
                self._forget(tree, block)
            del self._trees[replica_id]

    def insert(self, replica_id: str, hashes: Sequence[int]) -> None:
        """A prompt of these blocks (in prompt order) was sent there. No-op for an unknown replica.

        The last block counts as the oldest of them, so that a prefix is forgotten from its tail.
        """
        tree = self._trees.get(replica_id)
        if tree is None:
            return
        blocks, sent, bit = tree.blocks, self._sent, tree.bit
        for block in reversed(hashes):
            if block in blocks:
                del blocks[block]
            else:
                sent[block] = sent.get(block, 0) | bit
            blocks[block] = None
        for block in list(islice(blocks, max(0, len(blocks) - tree.max_blocks))):
            self._forget(tree, block)

    def match(self, hashes: Sequence[int]) -> dict[str, int]:
        """Leading blocks of the prompt that each replica was sent, by replica id; a replica without any is absent."""
        mask = 0
        matched: dict[int, int] = {}
        for num_before, block in enumerate(hashes):
            sent = self._sent.get(block, 0)
            still = mask & sent if num_before else sent
            for bit in _bits(mask & ~still):
                matched[bit] = num_before
            mask = still
            if not mask:
                break
        for bit in _bits(mask):
            matched[bit] = len(hashes)
        by_bit = {tree.bit: tree.replica_id for tree in self._trees.values()}
        return {by_bit[bit]: num_blocks for bit, num_blocks in matched.items()}

    def held_blocks(self) -> dict[str, int]:
        """Blocks remembered of each replica."""
        return {replica_id: len(tree.blocks) for replica_id, tree in self._trees.items()}

    def check(self) -> None:
        """Asserts that all directions agree; for tests."""
        rebuilt: dict[int, int] = {}
        for tree in self._trees.values():
            assert len(tree.blocks) <= tree.max_blocks
            for block in tree.blocks:
                rebuilt[block] = rebuilt.get(block, 0) | tree.bit
        assert rebuilt == self._sent

    def _forget(self, tree: _Tree, block: int) -> None:
        del tree.blocks[block]
        rest = self._sent[block] & ~tree.bit
        if rest:
            self._sent[block] = rest
        else:
            del self._sent[block]


def _bits(mask: int) -> list[int]:
    """The single bits of a mask, lowest first."""
    found = []
    while mask:
        lowest = mask & -mask
        found.append(lowest)
        mask ^= lowest
    return found
