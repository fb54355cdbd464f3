"""vLLM's KV cache events → the contract's.

vLLM names a block by a hash of its content, so one name can stand for several physical blocks (two requests that
compute the same prefix at once), each stored and removed by itself. Here a name is held until its last block has gone.
The contract's ids are never used twice, so a name that comes back, or comes back behind another parent, gets a new one.

Only whole blocks of full attention on the device are followed; what hangs on a block that is not known is not either.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from replicas.contract import BlocksEvicted, BlocksStored, CacheCleared, KvEvent, cache_namespace

BlockName: TypeAlias = int | bytes

_DEVICE = "GPU"  # vLLM's word for it, on a CPU too
_FULL_ATTENTION = (None, "full_attention")


class Stored(msgspec.Struct, frozen=True, tag="BlockStored", tag_field="type"):
    """Blocks behind one another. extra_keys: per block what else makes its name: adapter, at a root the salt."""

    block_hashes: list[BlockName]
    parent_block_hash: BlockName | None = None
    token_ids: list[int] = []
    block_size: int = 0
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class Removed(msgspec.Struct, frozen=True, tag="BlockRemoved", tag_field="type"):
    block_hashes: list[BlockName]
    medium: str | None = None
    group_idx: int | None = None


class Cleared(msgspec.Struct, frozen=True, tag="AllBlocksCleared", tag_field="type"):
    pass


VllmEvent: TypeAlias = Stored | Removed | Cleared


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """One message of vLLM's publisher. `ts`: Unix seconds."""

    ts: float
    events: list[VllmEvent]


@dataclass(slots=True)
class _Held:
    """A name that is held: our id, how many physical blocks, the parent's id, and what separates its cache."""

    block_id: int
    num_blocks: int
    parent_id: int | None
    namespace: str


class KvTranslation:
    """Follows one engine. `translate` and `lost` give events whose `seq` goes on from 0 without a gap."""

    def __init__(self, block_size: int) -> None:
        self.seq = 0
        self._block_size = block_size
        self._held: dict[BlockName, _Held] = {}
        self._next_id = 0
        self._group: int | None = None

    def __len__(self) -> int:
        """How many names are held."""
        return len(self._held)

    def translate(self, events: Iterable[VllmEvent]) -> list[KvEvent]:
        """In the order in which they were published."""
        found: list[KvEvent] = []
        for event in events:
            if isinstance(event, Stored):
                found += self._stored(event)
            elif isinstance(event, Removed):
                found += self._removed(event)
            else:
                found += self.lost()
        return found

    def lost(self) -> list[KvEvent]:
        """Some events will never be known: nothing is held any more, as far as anybody can say."""
        self._held.clear()
        return [CacheCleared(self._count())]

    def check(self) -> None:
        """Asserts that ids are told apart and counts are positive; for tests."""
        ids = [held.block_id for held in self._held.values()]
        assert len(ids) == len(set(ids))
        assert all(held.num_blocks > 0 and held.block_id < self._next_id for held in self._held.values())

    def _stored(self, event: Stored) -> Iterator[KvEvent]:
        root = self._root(event)
        if root is None:
            return
        parent_id, namespace = root
        run: list[int] = []  # new ids behind one another, not yet told
        run_parent, run_start = parent_id, 0
        for i, name in enumerate(event.block_hashes):
            held = self._held.get(name)
            if held is not None and held.parent_id == parent_id:
                held.num_blocks += 1
                yield from self._tell(run, run_parent, event, run_start, namespace)
                run, parent_id = [], held.block_id
                run_parent, run_start = parent_id, i + 1
                continue
            if held is not None:  # its parent went and came back: only as a new block can it be found behind it
                yield BlocksEvicted(self._count(), (held.block_id,))
            num_blocks = 1 if held is None else held.num_blocks + 1
            self._held[name] = _Held(self._next_id, num_blocks, parent_id, namespace)
            run.append(self._next_id)
            parent_id = self._next_id
            self._next_id += 1
        yield from self._tell(run, run_parent, event, run_start, namespace)

    def _root(self, event: Stored) -> tuple[int | None, str] | None:
        """(id of the block before, namespace); None when the blocks cannot be followed."""
        if event.medium not in (None, _DEVICE) or event.kv_cache_spec_kind not in _FULL_ATTENTION:
            return None
        if self._group is None:
            self._group = event.group_idx
        is_whole = event.block_size == self._block_size
        if not is_whole or event.group_idx != self._group or not event.block_hashes:
            return None
        if len(event.token_ids) != len(event.block_hashes) * self._block_size:
            return None
        if event.parent_block_hash is not None:
            parent = self._held.get(event.parent_block_hash)
            return None if parent is None else (parent.block_id, parent.namespace)
        namespace = _namespace(event)
        return None if namespace is None else (None, namespace)

    def _tell(
        self, run: list[int], parent_id: int | None, event: Stored, start: int, namespace: str
    ) -> Iterator[KvEvent]:
        if run:
            size = self._block_size
            tokens = array("I", event.token_ids[start * size : (start + len(run)) * size]).tobytes()
            yield BlocksStored(self._count(), tuple(run), parent_id, tokens, namespace)

    def _removed(self, event: Removed) -> Iterator[KvEvent]:
        if event.medium not in (None, _DEVICE) or event.group_idx != self._group:
            return
        gone: list[int] = []
        for name in event.block_hashes:
            held = self._held.get(name)
            if held is None:
                continue
            held.num_blocks -= 1
            if not held.num_blocks:
                gone.append(held.block_id)
                del self._held[name]
        if gone:
            yield BlocksEvicted(self._count(), tuple(gone))

    def _count(self) -> int:
        self.seq += 1
        return self.seq - 1


def _namespace(event: Stored) -> str | None:
    """What a chain's root says: the adapter, and the salt, which only the root carries. None: not one of ours."""
    keys = list((event.extra_keys or [None])[0] or ())
    if event.lora_name is not None and event.lora_name in keys:
        keys.remove(event.lora_name)
    salts = [key for key in keys if isinstance(key, str)]
    try:
        return cache_namespace(event.lora_name, bytes.fromhex(salts[-1] if salts else ""))
    except ValueError:
        return None
