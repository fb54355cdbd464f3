"""From an engine's KV blocks to the router's: which chained block hashes (`routing.prefix`) a replica holds.

    engine blocks   |e0 |e1 |e2 |e3 |e4 |e5 |…      `block_size` tokens each, with parents; any order of eviction
    routing blocks  |h0             |h1     |…      `block_tokens` each, hashed over namespace and all tokens before

Neither size need divide the other. A routing block is held while every engine block with a token of it is; where two
prompts part inside an engine block, or inside a routing block, each side counts for itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from replicas.contract import BlocksEvicted, BlocksStored, CacheCleared, KvEvent, split_cache_namespace
from routing.prefix import TOKEN_BYTES, Namespace, block_hashes_after

logger = logging.getLogger(__name__)


class _Block:
    """An engine block in the cache. About 280 bytes with its tokens and its place in the table.

    `last`: hash of the last routing block that ends in or before this one; `rest`: the tokens after its end.
    `hashes`: routing blocks that end in this one. The first of them may begin in blocks before, each of which has this
    block among its `dependents`; `whole` while all of those are held. `held` until it is evicted itself; `num_children`
    of the blocks that follow it are.
    """

    __slots__ = ("dependents", "hashes", "held", "last", "num_children", "parent", "rest", "whole")

    def __init__(self, parent: _Block | None, last: int, rest: bytes) -> None:
        self.parent = parent
        self.last = last
        self.rest = rest
        self.hashes: tuple[int, ...] = ()
        self.whole = True
        self.held = True
        self.num_children = 0
        self.dependents: _Dependents = None


_Dependents: TypeAlias = _Block | set[_Block] | None
"""Nearly always one at most: a set of its own would cost as much as the block."""


@dataclass(frozen=True, slots=True)
class BlocksOptions:
    """`model`: the id that routing hashes with. `max_blocks`: engine blocks to keep track of; an engine that claims to
    hold more gets the rest ignored, which costs hits and nothing else."""

    model: str
    block_tokens: int
    max_blocks: int


class RouteBlocks:
    """Follows an engine's KV events. `held`: routing block hashes → engine blocks that end one, oldest first.

    `changed`: hash → whether it is held now, for what may have changed since `take_changes`. `cleared`: more has
    changed than that says. `gaps`: since it was last empty, a block has gone before one that follows it. `kv_seq`: the
    number of the next event. Events that are missing empty it: an engine that lost some must clear and store anew.
    """

    def __init__(self, options: BlocksOptions) -> None:
        self.held: dict[int, int] = {}
        self.changed: dict[int, bool] = {}
        self.cleared = False
        self.gaps = False
        self.kv_seq = 0
        self.num_ignored = 0
        self._options = options
        self._stride = options.block_tokens * TOKEN_BYTES
        self._blocks: dict[int, _Block] = {}
        self._roots: dict[str, int] = {}

    @property
    def num_engine_blocks(self) -> int:
        return len(self._blocks)

    def apply(self, events: Iterable[KvEvent]) -> None:
        """Takes events in, in the order of their `seq`."""
        for event in events:
            if event.seq != self.kv_seq and self.kv_seq:
                logger.warning("KV events %d to %d are missing: beginning anew", self.kv_seq, event.seq - 1)
                self._clear()
            self.kv_seq = event.seq + 1
            if isinstance(event, BlocksStored):
                self._store(event)
            elif isinstance(event, BlocksEvicted):
                gone = [self._evict(block_id) for block_id in event.block_ids]
                self.gaps = self.gaps or any(block is not None and block.num_children for block in gone)
            else:
                assert isinstance(event, CacheCleared)
                self._clear()

    def take_changes(self) -> dict[int, bool]:
        """What `changed` says; begins a new one."""
        changed, self.changed = self.changed, {}
        self.cleared = False
        return changed

    def check(self) -> None:
        """Asserts that both directions agree; for tests."""
        counts: dict[int, int] = {}
        for block in self._blocks.values():
            for i, hashed in enumerate(block.hashes):
                if i or block.whole:
                    counts[hashed] = counts.get(hashed, 0) + 1
            for dependent in _each(block.dependents):
                assert dependent.held, "a dependent is kept that has left"
        assert counts == self.held

    # Inside.

    def _store(self, event: BlocksStored) -> None:
        parent: _Block | None = None
        if event.parent_id is None:
            last, rest = self._root(event.namespace), b""
        else:
            parent = self._blocks.get(event.parent_id)
            if parent is None:  # its tokens before are not known, so it cannot be hashed
                self.num_ignored += len(event.block_ids)
                return
            last, rest = parent.last, parent.rest
        size = len(event.token_ids) // len(event.block_ids)
        for i, block_id in enumerate(event.block_ids):
            if len(self._blocks) >= self._options.max_blocks:
                self.num_ignored += len(event.block_ids) - i
                return
            again = self._evict(block_id)
            self.gaps = self.gaps or (again is not None and again.num_children > 0)
            tokens = rest + event.token_ids[i * size : (i + 1) * size]
            parent = self._blocks[block_id] = self._add(parent, last, tokens, num_before=len(rest))
            last, rest = parent.last, parent.rest

    def _add(self, parent: _Block | None, last: int, tokens: bytes, num_before: int) -> _Block:
        """A block whose `tokens` begin with `num_before` bytes of its ancestors."""
        if parent is not None:
            parent.num_children += 1
        num_bytes = len(tokens) // self._stride * self._stride
        if not num_bytes:
            return _Block(parent, last, tokens)
        hashes = block_hashes_after(last, tokens[:num_bytes], self._options.block_tokens)
        block = _Block(parent, hashes[-1], tokens[num_bytes:])
        block.hashes = hashes
        size = len(tokens) - num_before
        while num_before > 0:
            if parent is None or not parent.held:
                block.whole = False
                break
            parent.dependents = _with(parent.dependents, block)
            parent = parent.parent
            num_before -= size
        for hashed in hashes if block.whole else hashes[1:]:
            self._hold(hashed)
        return block

    def _evict(self, block_id: int) -> _Block | None:
        block = self._blocks.pop(block_id, None)
        if block is None:
            return None
        for dependent in _each(block.dependents):
            if dependent.whole:
                dependent.whole = False
                self._release(dependent.hashes[0])
            _unlink(dependent, block.parent)
        for hashed in block.hashes if block.whole else block.hashes[1:]:
            self._release(hashed)
        _unlink(block, block.parent)
        block.held = False
        if block.parent is not None:
            block.parent.num_children -= 1
        block.parent, block.dependents = None, None  # whoever still points here must not keep ancestors in memory
        return block

    def _clear(self) -> None:
        self._blocks.clear()
        self.held.clear()
        self.changed.clear()
        self._roots.clear()
        self.gaps = False
        self.cleared = True

    def _hold(self, hashed: int) -> None:
        num = self.held.get(hashed, 0)
        self.held[hashed] = num + 1
        if not num:
            self.changed[hashed] = True

    def _release(self, hashed: int) -> None:
        num = self.held[hashed] - 1
        if num:
            self.held[hashed] = num
        else:
            del self.held[hashed]
            self.changed[hashed] = False

    def _root(self, namespace: str) -> int:
        root = self._roots.get(namespace)
        if root is None:
            if len(self._roots) >= self._options.max_blocks:
                self._roots.clear()
            adapter, salt = split_cache_namespace(namespace)
            root = self._roots[namespace] = Namespace(self._options.model, adapter, salt).root()
        return root


def _unlink(block: _Block, ancestor: _Block | None) -> None:
    """Nothing happens to `block` any more when `ancestor` or those before it leave."""
    while ancestor is not None and block in _each(ancestor.dependents):
        ancestor.dependents = _without(ancestor.dependents, block)
        ancestor = ancestor.parent


def _each(dependents: _Dependents) -> Sequence[_Block] | set[_Block]:
    if dependents is None:
        return ()
    return dependents if isinstance(dependents, set) else (dependents,)


def _with(dependents: _Dependents, block: _Block) -> _Dependents:
    if dependents is None:
        return block
    if isinstance(dependents, set):
        dependents.add(block)
        return dependents
    return {dependents, block}


def _without(dependents: _Dependents, block: _Block) -> _Dependents:
    if isinstance(dependents, set):
        dependents.discard(block)
        return dependents or None
    return None
