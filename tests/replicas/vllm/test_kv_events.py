"""vLLM's KV events, translated: against a pool that holds one content in several physical blocks."""

from __future__ import annotations

from array import array

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.contract import BlocksEvicted, BlocksStored, CacheCleared, cache_namespace
from replicas.kv_blocks import BlocksOptions, RouteBlocks
from replicas.vllm.kv_events import Batch, Cleared, KvTranslation, Removed, Stored
from routing.prefix import Namespace, block_hashes_after

SIZE = 4


def tokens_of(path: tuple[int, ...]) -> list[int]:
    """A block's content is told by its path from the root."""
    return [path[-1]] * SIZE


def name_of(path: tuple[int, ...]) -> int:
    return hash(path) & 0xFFFF_FFFF_FFFF


def stored(path: tuple[int, ...], num_new: int, **more: object) -> Stored:
    """The last `num_new` blocks of a path."""
    known = len(path) - num_new
    paths = [path[: i + 1] for i in range(known, len(path))]
    return Stored(
        block_hashes=[name_of(p) for p in paths],
        parent_block_hash=name_of(path[:known]) if known else None,
        token_ids=[token for p in paths for token in tokens_of(p)],
        block_size=SIZE,
        medium="GPU",
        group_idx=0,
        **more,  # type: ignore[arg-type]
    )


def removed(path: tuple[int, ...]) -> Removed:
    return Removed(block_hashes=[name_of(path)], medium="GPU", group_idx=0)


def route_hash(path: tuple[int, ...]) -> int:
    tokens = array("I", [t for i in range(len(path)) for t in tokens_of(path[: i + 1])]).tobytes()
    return block_hashes_after(Namespace("m", None, b"").root(), tokens, SIZE)[-1]


PATHS = st.lists(st.integers(1, 2), min_size=1, max_size=4).map(tuple)
OPERATIONS = st.lists(st.tuples(st.sampled_from(["store", "remove", "clear"]), PATHS, st.integers(1, 4)), max_size=60)


@settings(max_examples=400, deadline=None)
@given(OPERATIONS)
def test_routing_holds_just_what_vllm_holds(operations: list[tuple[str, tuple[int, ...], int]]) -> None:
    translation, blocks = KvTranslation(SIZE), RouteBlocks(BlocksOptions("m", SIZE, 1000))
    physical: dict[tuple[int, ...], int] = {}
    for what, path, number in operations:
        if what == "store":
            num_new = min(number, len(path))
            known = len(path) - num_new
            events = translation.translate([stored(path, num_new)])
            if not known or physical.get(path[:known]):  # what hangs on nothing known is not followed
                for i in range(known, len(path)):
                    physical[path[: i + 1]] = physical.get(path[: i + 1], 0) + 1
        elif what == "remove":
            events = translation.translate([removed(path)])
            if physical.get(path):
                physical[path] -= 1
        elif number == 1:
            events = translation.translate([Cleared()])
            physical.clear()
        else:
            continue
        blocks.apply(events)
        translation.check()
        blocks.check()
        assert blocks.held.keys() == {route_hash(p) for p, count in physical.items() if count}
        assert blocks.kv_seq == translation.seq or not translation.seq
        assert len(translation) == sum(1 for count in physical.values() if count)


def test_a_block_computed_twice_is_held_until_both_copies_have_gone() -> None:
    translation = KvTranslation(SIZE)
    first = translation.translate([stored((1, 2), 2)])
    assert [type(event) for event in first] == [BlocksStored]
    assert translation.translate([stored((1, 2), 2)]) == []
    assert translation.translate([removed((1, 2))]) == []
    assert translation.translate([removed((1, 2))]) == [BlocksEvicted(1, (1,))]


def test_ids_are_never_used_again() -> None:
    translation = KvTranslation(SIZE)
    seen: list[int] = []
    for _ in range(3):
        for event in translation.translate([stored((1,), 1), removed((1,))]):
            if isinstance(event, BlocksStored):
                seen += event.block_ids
    assert seen == [0, 1, 2]


def test_adapter_and_salt_of_the_root_separate_caches() -> None:
    translation = KvTranslation(SIZE)
    salt = b"\x01\xff"
    root = stored((1,), 1, lora_name="a@2", extra_keys=[["a@2", salt.hex()]])
    child = stored((1, 2), 1, lora_name="a@2", extra_keys=[["a@2"]])
    events = translation.translate([root, child])
    assert [event.namespace for event in events if isinstance(event, BlocksStored)] == [
        cache_namespace("a@2", salt)
    ] * 2


@pytest.mark.parametrize(
    "event",
    [
        msgspec.structs.replace(stored((1,), 1), medium="CPU"),
        msgspec.structs.replace(stored((1,), 1), kv_cache_spec_kind="sliding_window"),
        msgspec.structs.replace(stored((1,), 1), block_size=2),
        msgspec.structs.replace(stored((1,), 1), token_ids=[1]),
        stored((1,), 1, extra_keys=[["not ours"]]),
        stored((1, 2), 1),
    ],
    ids=["offloaded", "another kind", "part of a block", "masked", "a foreign salt", "parent unknown"],
)
def test_blocks_that_cannot_be_routed_to_are_not_followed(event: Stored) -> None:
    assert KvTranslation(SIZE).translate([event]) == []


def test_what_was_lost_clears_and_begins_anew() -> None:
    translation = KvTranslation(SIZE)
    translation.translate([stored((1,), 1)])
    assert translation.lost() == [CacheCleared(1)]
    assert translation.translate([removed((1,))]) == []
    assert len(translation) == 0


def test_a_message_of_vllms_is_read_with_keys_that_are_not_known() -> None:
    raw = msgspec.msgpack.encode(
        [
            1.5,
            [
                {"type": "BlockStored", "block_hashes": [2**64 - 1], "parent_block_hash": None, "token_ids": [1] * SIZE,
                 "block_size": SIZE, "lora_id": None, "medium": "GPU", "locality": "new"},
                {"type": "BlockRemoved", "block_hashes": [2**64 - 1], "medium": "GPU"},
                {"type": "AllBlocksCleared"},
            ],
            0,
        ]
    )  # fmt: skip
    events = KvTranslation(SIZE).translate(msgspec.msgpack.decode(raw, type=Batch).events)
    assert [type(event) for event in events] == [BlocksStored, BlocksEvicted, CacheCleared]
