"""What a server's prefix cache probably holds, for servers that do not say: whatever was sent there last.

Measured in a simulator: as good as exact events on conversations, 17 to 19 % less capacity on agents' sessions.
"""

from __future__ import annotations

from collections import OrderedDict

from replicas.contract import BlocksEvicted, BlocksStored, KvEvent

TOKEN_BYTES = 4


class PrefixMirror:
    """Blocks of `block_size` tokens, at most `num_blocks`, the least recently used go first. Events count from 0."""

    def __init__(self, block_size: int, num_blocks: int) -> None:
        self.seq = 0
        self._stride = block_size * TOKEN_BYTES
        self._num_blocks = num_blocks
        self._held: OrderedDict[tuple[int | None, str, bytes], int] = OrderedDict()  # (parent, namespace, tokens) → id
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._held)

    def seen(self, tokens: bytes, namespace: str) -> list[KvEvent]:
        """A prompt was computed there. tokens: packed ids"""
        parent: int | None = None
        chain: list[tuple[int | None, str, bytes]] = []
        new: list[tuple[int, bytes]] = []
        new_parent: int | None = None
        for start in range(0, min(len(tokens) // self._stride, self._num_blocks) * self._stride, self._stride):
            block = tokens[start : start + self._stride]
            key = (parent, namespace, block)
            held = self._held.get(key)
            if held is None:
                if not new:
                    new_parent = parent
                held = self._held[key] = self._next_id
                self._next_id += 1
                new.append((held, block))
            chain.append(key)
            parent = held
        for key in reversed(chain):  # a parent is used after its children, so leaves go first
            self._held.move_to_end(key)
        events: list[KvEvent] = []
        gone = [self._held.popitem(last=False)[1] for _ in range(len(self._held) - self._num_blocks)]
        if gone:
            events.append(BlocksEvicted(self._count(), tuple(gone)))
        if new:
            ids, blocks = zip(*new, strict=True)
            events.append(BlocksStored(self._count(), ids, new_parent, b"".join(blocks), namespace))
        return events

    def _count(self) -> int:
        self.seq += 1
        return self.seq - 1
