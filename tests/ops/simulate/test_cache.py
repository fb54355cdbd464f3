"""The token-counting cache against a naive one."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ops.simulate.cache import PagedCache

SIZE = 4


def test_tails_are_evicted_before_heads_and_old_prompts_before_new_ones() -> None:
    evicted: list[int] = []
    cache = PagedCache(6 * SIZE, SIZE, lambda kind, hashes: evicted.extend(hashes if kind == "evicted" else ()))
    for blocks in ((1, 2, 3), (11, 12, 13)):
        assert cache.take(blocks, 0, 3 * SIZE)
        cache.store(blocks, 0, 3)
        cache.release(blocks, 0)
    assert cache.take((1, 2, 3), 3, 0)  # used again: now the younger
    cache.release((1, 2, 3), 0)
    assert cache.take((21, 22, 23, 24), 0, 4 * SIZE)
    assert evicted == [13, 12, 11, 3]
    assert cache.match((1, 2, 3)) == 2


def test_blocks_in_use_are_never_evicted() -> None:
    cache = PagedCache(4 * SIZE, SIZE)
    assert cache.take((1, 2, 3), 0, 3 * SIZE)
    cache.store((1, 2, 3), 0, 3)
    assert not cache.take((9, 8), 0, 2 * SIZE)
    assert cache.num_free_tokens == SIZE and cache.match((1, 2, 3)) == 3


def test_taking_counts_idle_blocks_it_takes_itself() -> None:
    """Two idle blocks and two free: a prompt that uses those two idle ones has room for two more, not for three."""
    cache = PagedCache(4 * SIZE, SIZE)
    cache.take((1, 2), 0, 2 * SIZE)
    cache.store((1, 2), 0, 2)
    cache.release((1, 2), 0)
    assert not cache.take((1, 2, 3, 4, 5), 2, 3 * SIZE)
    assert cache.take((1, 2, 3, 4), 2, 2 * SIZE)


prompts = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(
    lambda parts: tuple(hash(tuple(parts[: i + 1])) for i in range(len(parts)))
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(prompts, st.integers(0, 5)), max_size=40), st.integers(3, 12))
def test_whatever_comes_and_goes_bounds_hold_and_matches_are_prefixes(
    steps: list[tuple[tuple[int, ...], int]], capacity_blocks: int
) -> None:
    cache = PagedCache(capacity_blocks * SIZE, SIZE)
    open_tables: list[tuple[int, ...]] = []
    for blocks, choice in steps:
        matched = cache.match(blocks)
        assert [block in cache for block in blocks] == [i < matched for i in range(len(blocks))]
        if choice < 3 and cache.take(blocks, matched, (len(blocks) - matched) * SIZE):
            cache.check()
            cache.store(blocks, matched, len(blocks))
            open_tables.append(blocks)
            assert cache.match(blocks) == len(blocks)
        elif open_tables:
            cache.release(open_tables.pop(choice % len(open_tables)), 0)
        cache.check()
        for table in open_tables:
            assert cache.match(table) == len(table), "in use, and yet gone"
    for table in open_tables:
        cache.release(table, 0)
    assert cache.private == 0 and cache.num_free_tokens == capacity_blocks * SIZE
