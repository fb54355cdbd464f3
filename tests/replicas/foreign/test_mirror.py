"""The guess at a foreign server's prefix cache: an LRU of blocks, as events."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.foreign.mirror import PrefixMirror
from replicas.kv_blocks import BlocksOptions, RouteBlocks
from routing.prefix import Namespace, block_hashes_after

SIZE = 4


def packed(tokens: list[int]) -> bytes:
    return array("I", [token for token in tokens for _ in range(SIZE)]).tobytes()


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=40)


@settings(max_examples=300, deadline=None)
@given(PROMPTS, st.integers(5, 12))
def test_routing_sees_the_last_prompt_whole_and_never_more_than_fits(prompts: list[list[int]], num_blocks: int) -> None:
    mirror, blocks = PrefixMirror(SIZE, num_blocks), RouteBlocks(BlocksOptions("m", SIZE, 10_000))
    for prompt in prompts:
        blocks.apply(mirror.seen(packed(prompt), "|"))
        blocks.check()
        assert len(mirror) <= num_blocks
        assert len(blocks.held) == len(mirror)
        hashes = block_hashes_after(Namespace("m", None, b"").root(), packed(prompt), SIZE)
        assert set(hashes) <= blocks.held.keys()
        assert not blocks.gaps, "a parent left before its child"
    assert blocks.kv_seq == mirror.seq


def test_namespaces_do_not_share_blocks() -> None:
    mirror = PrefixMirror(SIZE, 10)
    mirror.seen(packed([1]), "|")
    mirror.seen(packed([1]), "|ff")
    assert len(mirror) == 2
