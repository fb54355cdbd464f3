"""The block pool alone: places, references, the cache's exactness, eviction order, events."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from replicas.contract import BlocksEvicted, BlocksStored, CacheCleared, KvEvent, pack_tokens
from replicas.engine.block_pool import BlockPool

SIZE = 4


def tokens(*ids: int) -> array[int]:
    return array("I", ids)


def stored(pool: BlockPool, namespace: str, ids: array[int]) -> list[int]:
    """A table whose full blocks are in the cache, still held."""
    table = pool.allocate(len(ids) // SIZE)
    pool.store(namespace, ids, table, range(len(table)))
    return table


def test_a_stored_prefix_is_found_up_to_the_first_different_block() -> None:
    pool = BlockPool(8, SIZE)
    table = stored(pool, "a", tokens(*range(12)))
    assert pool.match("a", tokens(*range(12))) == table
    assert pool.match("a", tokens(*range(11))) == table[:2]
    assert pool.match("a", tokens(*range(8), 99, 9, 10, 11)) == table[:2]
    assert pool.match("a", tokens(99, *range(1, 12))) == []


def test_namespaces_never_meet() -> None:
    pool = BlockPool(8, SIZE)
    stored(pool, "a", tokens(*range(8)))
    assert pool.match("b", tokens(*range(8))) == []
    assert pool.match("", tokens(*range(8))) == []


def test_equal_second_blocks_under_different_parents_are_different() -> None:
    pool = BlockPool(8, SIZE)
    one = stored(pool, "a", tokens(1, 1, 1, 1, 5, 5, 5, 5))
    two = stored(pool, "a", tokens(2, 2, 2, 2, 5, 5, 5, 5))
    assert pool.match("a", tokens(1, 1, 1, 1, 5, 5, 5, 5)) == one
    assert pool.match("a", tokens(2, 2, 2, 2, 5, 5, 5, 5)) == two
    assert not set(one) & set(two)


def test_a_freed_chain_is_evicted_from_its_tail() -> None:
    pool = BlockPool(4, SIZE)
    table = stored(pool, "a", tokens(*range(16)))
    pool.free(table)
    for left in (3, 2, 1, 0):
        pool.allocate(1)
        assert pool.match("a", tokens(*range(16))) == table[:left]
        pool.check()


def test_the_least_recently_used_chain_goes_first() -> None:
    pool = BlockPool(4, SIZE)
    old, new = stored(pool, "old", tokens(*range(8))), stored(pool, "new", tokens(*range(8)))
    pool.free(old)
    pool.free(new)
    pool.acquire(old)
    pool.free(old)  # used again
    pool.allocate(2)
    assert pool.match("old", tokens(*range(8))) == old
    assert pool.match("new", tokens(*range(8))) == []


def test_blocks_in_use_are_never_evicted() -> None:
    pool = BlockPool(4, SIZE)
    held = stored(pool, "a", tokens(*range(8)))
    idle = stored(pool, "b", tokens(*range(8)))
    pool.free(idle)
    assert pool.num_free == 2
    assert set(pool.allocate(2)) == set(idle)
    assert pool.match("a", tokens(*range(8))) == held
    with pytest.raises(AssertionError, match="free=0"):
        pool.allocate(1)


def test_two_tables_with_equal_content_end_up_with_one_copy() -> None:
    pool = BlockPool(8, SIZE)
    ids = tokens(*range(12))
    first, second = pool.allocate(3), pool.allocate(3)
    pool.store("a", ids, first, range(2))
    pool.store("a", ids, second, range(3))
    assert second[:2] == first[:2]
    pool.store("a", ids, first, range(2, 3))
    assert first == second
    assert pool.num_used == 3
    pool.check([first, second])


def test_a_block_freed_twice_is_our_bug() -> None:
    pool = BlockPool(2, SIZE)
    table = pool.allocate(1)
    pool.free(table)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(table)


def test_clearing_forgets_prefixes_and_keeps_blocks_in_use() -> None:
    pool = BlockPool(8, SIZE)
    held, idle = stored(pool, "a", tokens(*range(8))), stored(pool, "b", tokens(*range(8)))
    pool.free(idle)
    pool.clear()
    assert pool.match("a", tokens(*range(8))) == pool.match("b", tokens(*range(8))) == []
    assert (pool.num_used, pool.num_cached) == (2, 0)
    held += pool.allocate(1)
    pool.store("a", tokens(*range(12)), held, range(2, 3))  # its parent is not cached: neither is it
    assert pool.num_cached == 0
    pool.check([held])


def test_events_tell_what_is_cached() -> None:
    pool = BlockPool(2, SIZE)
    table = stored(pool, "a", tokens(*range(8)))
    pool.free(table)
    pool.allocate(1)
    pool.clear()
    first, second, third = pool.take_events()
    assert isinstance(first, BlocksStored) and isinstance(second, BlocksEvicted) and isinstance(third, CacheCleared)
    assert (first.parent_id, first.namespace, first.token_ids) == (None, "a", pack_tokens(range(8)))
    assert second.block_ids == first.block_ids[1:]
    assert [first.seq, second.seq, third.seq] == [0, 1, 2]
    assert pool.take_events() == []


def test_events_name_the_parent_of_a_continued_chain() -> None:
    pool = BlockPool(4, SIZE)
    ids = tokens(*range(12))
    table = pool.allocate(3)
    pool.store("a", ids, table, range(1))
    pool.store("a", ids, table, range(1, 3))
    first, second = pool.take_events()
    assert isinstance(first, BlocksStored) and isinstance(second, BlocksStored)
    assert second.parent_id == first.block_ids[-1]
    assert len(second.block_ids) == 2


def test_block_uids_are_never_used_again() -> None:
    pool = BlockPool(1, SIZE)
    seen: set[int] = set()
    for i in range(5):
        pool.free(stored(pool, "a", tokens(i, i, i, i)))
    for event in pool.take_events():
        if isinstance(event, BlocksStored):
            assert not seen & set(event.block_ids)
            seen.update(event.block_ids)
    assert len(seen) == 5


def test_uncollected_events_are_bounded_and_end_with_the_truth() -> None:
    pool = BlockPool(4, SIZE, max_events=10)
    for i in range(100):
        pool.free(stored(pool, "a", tokens(i, i, i, i, 7, 7, 7, 7)))
    events = pool.take_events()
    assert len(events) == 1 + pool.num_cached
    assert isinstance(events[0], CacheCleared)
    mirror = Mirror()
    mirror.follow(events)
    assert mirror.uids == {entry.uid for entry in pool._cached.values()}


class Mirror:
    """A reader of KV events: what a router would believe."""

    def __init__(self) -> None:
        self.uids: set[int] = set()
        self.seq = -1

    def follow(self, events: list[KvEvent]) -> None:
        for event in events:
            assert event.seq > self.seq
            self.seq = event.seq
            if isinstance(event, CacheCleared):
                self.uids.clear()
            elif isinstance(event, BlocksStored):
                assert event.parent_id is None or event.parent_id in self.uids
                assert len(event.token_ids) == 4 * SIZE * len(event.block_ids)
                self.uids.update(event.block_ids)
            else:
                assert self.uids.issuperset(event.block_ids)
                self.uids.difference_update(event.block_ids)


class PoolMachine(RuleBasedStateMachine):
    """Sequences come with a prefix from the cache, grow, are computed, and go; contents are followed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, SIZE, max_events=6)
        self.tables: list[tuple[str, array[int], list[int], int]] = []  # namespace, tokens, table, computed blocks
        self.content: dict[int, tuple[str, bytes]] = {}  # block → namespace and all tokens up to its end
        self.mirror = Mirror()

    @rule(namespace=st.sampled_from("ab"), blocks=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def admit(self, namespace: str, blocks: list[int]) -> None:
        ids = array("I", [block for block in blocks for _ in range(SIZE)])
        matched = self.pool.match(namespace, ids)
        for i, block_id in enumerate(matched):
            assert self.content[block_id] == (namespace, ids[: (i + 1) * SIZE].tobytes()), "a wrong cache hit"
        missing = len(blocks) - len(matched)
        if missing + self.pool.num_idle(matched) > self.pool.num_free:
            return
        self.pool.acquire(matched)
        table = matched + self.pool.allocate(missing)
        self.tables.append((namespace, ids, table, len(matched)))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), count=st.integers(1, 3))
    def compute(self, data: st.DataObject, count: int) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        namespace, ids, table, done = self.tables[index]
        until = min(len(table), done + count)
        for i in range(done, until):
            self.content[table[i]] = (namespace, ids[: (i + 1) * SIZE].tobytes())
        self.pool.store(namespace, ids, table, range(done, until))
        self.tables[index] = (namespace, ids, table, until)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.free(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))[2])

    @rule()
    def clear(self) -> None:
        self.pool.clear()

    @rule()
    def read_events(self) -> None:
        self.mirror.follow(self.pool.take_events())
        assert self.mirror.uids == {entry.uid for entry in self.pool._cached.values()}

    @invariant()
    def holds(self) -> None:
        self.pool.check([table for _, _, table, _ in self.tables])
        for namespace, ids, table, done in self.tables:
            for i in range(done):
                assert self.content[table[i]] == (namespace, ids[: (i + 1) * SIZE].tobytes())


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None, derandomize=True)
