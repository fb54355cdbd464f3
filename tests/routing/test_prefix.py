"""Block hashes."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from replicas.contract import pack_tokens
from routing.prefix import Namespace, block_hashes

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)
BASE = Namespace("m", None, b"salt")


@given(tokens, st.integers(1, 9))
def test_hashes_are_the_chain_of_the_design_over_full_blocks_only(ids: list[int], block_tokens: int) -> None:
    expected = []
    previous = BASE.root()
    for block in range(len(ids) // block_tokens):
        part = array("I", ids[block * block_tokens : (block + 1) * block_tokens]).tobytes()
        previous = xxh3_64_intdigest(part, seed=previous)
        expected.append(previous)
    assert block_hashes(pack_tokens(ids), block_tokens, BASE) == tuple(expected)


@given(tokens, tokens, st.integers(1, 5))
def test_two_prompts_share_exactly_the_hashes_of_their_common_blocks(a: list[int], b: list[int], size: int) -> None:
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    pairs = zip(block_hashes(pack_tokens(a), size, BASE), block_hashes(pack_tokens(b), size, BASE), strict=False)
    equal = [x == y for x, y in pairs]
    num_common = common // size
    assert equal == [True] * num_common + [False] * (len(equal) - num_common)


@pytest.mark.parametrize(
    "other",
    [
        Namespace("m2", None, b"salt"),
        Namespace("m", "a@1", b"salt"),
        Namespace("m", None, b"salt2"),
        Namespace("ms", None, b"alt"),
        Namespace("m", "salt", b""),
    ],
)
def test_another_model_adapter_or_salt_shares_no_block(other: Namespace) -> None:
    prompt = pack_tokens(range(64))
    assert not set(block_hashes(prompt, 16, BASE)) & set(block_hashes(prompt, 16, other))


def test_a_hash_is_the_same_in_every_process() -> None:
    assert block_hashes(pack_tokens([1, 2, 3, 4]), 2, Namespace("m")) == block_hashes(
        b"\x01\0\0\0\x02\0\0\0\x03\0\0\0\x04\0\0\0", 2, Namespace("m", None, b"")
    )
    assert Namespace("m").root() == xxh3_64_intdigest(b"\x01\0\0\0m\0\0\0\0\0\0\0\0")
