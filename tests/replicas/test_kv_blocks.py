"""From engine blocks to routing blocks, against recomputation from scratch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.contract import (
    BlocksEvicted,
    BlocksStored,
    CacheCleared,
    KvEvent,
    cache_namespace,
    pack_tokens,
    split_cache_namespace,
)
from replicas.engine.block_pool import BlockPool
from replicas.kv_blocks import BlocksOptions, RouteBlocks
from routing.prefix import Namespace, block_hashes

ROOT = cache_namespace(None, b"")


def follow(block_tokens: int = 4, max_blocks: int = 1000) -> RouteBlocks:
    return RouteBlocks(BlocksOptions("m", block_tokens, max_blocks))


def hashes(tokens: Sequence[int], block_tokens: int = 4, namespace: str = ROOT) -> tuple[int, ...]:
    adapter, salt = split_cache_namespace(namespace)
    return block_hashes(pack_tokens(tokens), block_tokens, Namespace("m", adapter, salt))


def stored(seq: int, ids: Sequence[int], parent: int | None, tokens: Sequence[int]) -> BlocksStored:
    return BlocksStored(seq, tuple(ids), parent, pack_tokens(tokens), ROOT)


def test_a_routing_block_is_held_once_its_last_engine_block_is_stored() -> None:
    blocks = follow()
    blocks.apply([stored(0, [10], None, [1, 2])])
    assert not blocks.held
    blocks.apply([stored(1, [11, 12], 10, [3, 4, 5, 6])])
    assert tuple(blocks.held) == hashes([1, 2, 3, 4])
    blocks.apply([stored(2, [13], 12, [7, 8])])
    assert tuple(blocks.held) == hashes(range(1, 9))
    assert blocks.take_changes() == dict.fromkeys(hashes(range(1, 9)), True)
    assert blocks.kv_seq == 3
    blocks.check()


@pytest.mark.parametrize("evicted", [10, 11])
def test_a_routing_block_is_gone_with_any_of_its_engine_blocks(evicted: int) -> None:
    blocks = follow()
    blocks.apply([stored(0, [10, 11, 12, 13], None, range(1, 9))])
    blocks.take_changes()
    blocks.apply([BlocksEvicted(1, (evicted,))])
    first, second = hashes(range(1, 9))
    assert set(blocks.held) == {second}, "what comes after is there still, behind the hole"
    assert blocks.gaps
    assert blocks.take_changes() == {first: False}
    blocks.check()


def test_what_comes_back_under_another_id_counts_again() -> None:
    blocks = follow()
    blocks.apply([stored(0, [10, 11], None, [1, 2, 3, 4]), BlocksEvicted(1, (10,))])
    assert not blocks.held
    blocks.apply([stored(2, [20], None, [1, 2])])
    assert not blocks.held, "block 11 continues the one that left"
    blocks.apply([stored(3, [21], 20, [3, 4])])
    assert tuple(blocks.held) == hashes([1, 2, 3, 4])
    blocks.apply([BlocksEvicted(4, (11,))])
    assert tuple(blocks.held) == hashes([1, 2, 3, 4])
    blocks.check()


def test_prompts_that_part_inside_a_routing_block_share_its_beginning() -> None:
    blocks = follow()
    blocks.apply([stored(0, [10], None, [1, 2])])
    blocks.apply([stored(1 + i, [20 + i], 10, [3, 100 + i]) for i in range(50)])
    assert set(blocks.held) == {hashes([1, 2, 3, 100 + i])[0] for i in range(50)}
    blocks.apply([BlocksEvicted(51, (20,)), BlocksEvicted(52, (10,))])
    assert not blocks.held
    blocks.check()


def test_an_engine_block_larger_than_a_routing_block_ends_several() -> None:
    blocks = follow(block_tokens=4)
    blocks.apply([stored(0, [1, 2], None, range(20))])  # ten tokens a block: 2.5 routing blocks
    assert tuple(blocks.held) == hashes(range(20))
    blocks.apply([BlocksEvicted(1, (1,))])
    assert tuple(blocks.held) == hashes(range(20))[3:], "the third began in the evicted one"
    blocks.check()


def test_namespaces_share_nothing_and_hash_as_the_router_does() -> None:
    blocks = follow()
    spaces = [cache_namespace(adapter, salt) for adapter in (None, "a|b@1", "c@2") for salt in (b"", b"\x00|")]
    for i, namespace in enumerate(spaces):
        blocks.apply([BlocksStored(i, (i,), None, pack_tokens([1, 2, 3, 4]), namespace)])
    assert len(blocks.held) == len(spaces)
    assert set(blocks.held) == {hashes([1, 2, 3, 4], namespace=namespace)[0] for namespace in spaces}


def test_a_cleared_cache_holds_nothing_and_says_so() -> None:
    blocks = follow()
    blocks.apply([stored(0, [1, 2], None, range(4)), CacheCleared(1)])
    assert not blocks.held and blocks.cleared and not blocks.num_engine_blocks
    blocks.apply([stored(2, [3], 2, [7, 8])])
    assert not blocks.held, "its parent is not known any more"
    assert blocks.num_ignored == 1


def test_missing_events_empty_it_rather_than_leave_something_wrong() -> None:
    blocks = follow()
    blocks.apply([stored(0, [1, 2], None, range(4))])
    blocks.apply([stored(2, [5, 6], None, range(10, 14))])
    assert blocks.cleared
    assert tuple(blocks.held) == hashes(range(10, 14))


def test_memory_is_bounded_whatever_the_engine_claims() -> None:
    blocks = follow(max_blocks=100)
    blocks.apply([stored(i, [2 * i, 2 * i + 1], None, range(i, i + 4)) for i in range(500)])
    assert blocks.num_engine_blocks == 100
    assert len(blocks.held) == 50
    blocks.check()


def test_tails_that_go_first_leave_no_gaps_in_whatever_order_one_event_names_them() -> None:
    blocks = follow()
    blocks.apply([stored(0, [10, 11, 12, 13], None, range(1, 9)), stored(1, [20, 21], 11, [6, 6, 6, 6])])
    blocks.apply([BlocksEvicted(2, (12, 13)), BlocksEvicted(3, (21,)), BlocksEvicted(4, (20,))])
    assert not blocks.gaps
    assert tuple(blocks.held) == hashes([1, 2, 3, 4])
    blocks.apply([stored(5, [12], 11, [5, 6]), BlocksEvicted(6, (11,))])
    assert blocks.gaps
    blocks.apply([BlocksEvicted(7, (12,))])
    assert blocks.gaps, "who does it once may do it again"
    blocks.apply([CacheCleared(8)])
    assert not blocks.gaps


def test_a_block_that_is_stored_anew_under_the_same_id_leaves_those_that_followed_it_alone() -> None:
    blocks = follow()
    blocks.apply([stored(0, [10, 11], None, [1, 2, 3, 4]), stored(1, [10], None, [9, 9])])
    assert blocks.gaps


class Naive:
    """The engine's cache as id → (parent, tokens, namespace); everything else is worked out anew each time."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, tuple[int, ...], str]] = {}
        self.ever: dict[int, tuple[int | None, tuple[int, ...], str]] = {}

    def apply(self, events: Sequence[KvEvent]) -> None:
        for event in events:
            if isinstance(event, CacheCleared):
                self.blocks.clear()
            elif isinstance(event, BlocksEvicted):
                for block_id in event.block_ids:
                    del self.blocks[block_id]
            else:
                parent, tokens = event.parent_id, array("I", event.token_ids)
                size = len(tokens) // len(event.block_ids)
                for i, block_id in enumerate(event.block_ids):
                    self.blocks[block_id] = (parent, tuple(tokens[i * size : (i + 1) * size]), event.namespace)
                    self.ever[block_id] = self.blocks[block_id]
                    parent = block_id

    def whole(self, block_tokens: int) -> set[int]:
        """Hashes of the routing blocks whose engine blocks are all there."""
        found: set[int] = set()
        for block_id in self.blocks:
            chain: list[int] = []
            at: int | None = block_id
            while at is not None:
                chain.insert(0, at)
                at = self.ever[at][0]
            tokens = [token for link in chain for token in self.ever[link][1]]
            owners = [link for link in chain for _ in self.ever[link][1]]
            for i, hashed in enumerate(hashes(tokens, block_tokens, self.ever[block_id][2])):
                if set(owners[i * block_tokens : (i + 1) * block_tokens]) <= self.blocks.keys():
                    found.add(hashed)
        return found


sizes = st.sampled_from([(2, 2), (2, 4), (2, 8), (4, 2), (3, 4), (5, 3), (6, 4), (1, 3)])
lines = st.lists(st.integers(0, 2), max_size=24)
namespaces = st.sampled_from([ROOT, cache_namespace("lora@1", b""), cache_namespace(None, b"tenant")])
steps = st.lists(st.one_of(st.tuples(namespaces, lines), st.integers(1, 12), st.just("clear")), max_size=25)


@settings(max_examples=150, deadline=None)
@given(sizes, steps)
def test_the_pools_events_translate_like_a_recomputation(
    size: tuple[int, int], steps: list[tuple[str, list[int]] | int | str]
) -> None:
    block_size, block_tokens = size
    pool, naive, blocks = BlockPool(12, block_size), Naive(), follow(block_tokens)
    known: set[int] = set()
    for step in steps:
        if step == "clear":
            pool.clear()
        elif isinstance(step, int):
            pool.free(pool.allocate(step))
        else:
            assert isinstance(step, tuple)
            namespace, tokens = step[0], array("I", step[1])
            num_full = len(tokens) // block_size
            matched = pool.match(namespace, tokens)
            pool.acquire(matched)
            table = matched + pool.allocate(min(pool.num_free, num_full - len(matched)))
            pool.store(namespace, tokens, table, range(len(matched), len(table)))
            pool.free(table)
        events = pool.take_events()
        naive.apply(events)
        blocks.apply(events)
        blocks.check()
        assert set(blocks.held) == naive.whole(block_tokens)
        if blocks.cleared:
            known.clear()
        for block, is_held in blocks.take_changes().items():
            known.add(block) if is_held else known.discard(block)
        assert known == set(blocks.held)
        assert not blocks.gaps, "tails go first"


moves = st.lists(st.one_of(st.tuples(st.integers(0, 30), st.integers(0, 3)), st.integers(0, 30)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(sizes, moves)
def test_eviction_in_any_order_translates_like_a_recomputation(
    size: tuple[int, int], moves: list[tuple[int, int] | int]
) -> None:
    """Engines with hashed blocks (vLLM) may evict a parent first; a hole is then what the index sees."""
    block_size, block_tokens = size
    naive, blocks, seq = Naive(), follow(block_tokens), 0
    for next_id, move in enumerate(moves):
        alive = list(naive.blocks)
        if isinstance(move, int):
            if not alive:
                continue
            events: list[KvEvent] = [BlocksEvicted(seq, (alive[move % len(alive)],))]
        else:
            parent = None if not alive or move[0] == 0 else alive[move[0] % len(alive)]
            tokens = [move[1] + i for i in range(block_size)]
            events = [stored(seq, [next_id], parent, tokens)]
        seq += 1
        naive.apply(events)
        blocks.apply(events)
        blocks.check()
        assert set(blocks.held) == naive.whole(block_tokens)
        alive_parents = (parent is None or parent in naive.blocks for parent, _, _ in naive.blocks.values())
        assert blocks.gaps or all(alive_parents)
    blocks.apply([BlocksEvicted(seq, tuple(naive.blocks))])
    assert not blocks.held
    blocks.check()
