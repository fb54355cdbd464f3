"""A number for each start of a replica that is larger than all before it, whatever its clock says."""

from __future__ import annotations

import contextlib

from routing.kv_events import KvKeys, parse_entry_id
from routing.registry import read_word
from routing.store import Reply, Store, StoreReplyError

MAX_EPOCH = 1 << 62
"""What claims to be later is no word of a replica's, and would leave no room for the next start."""


async def next_epoch(store: Store, replica_id: str, now: float) -> int:
    """`now` (Unix seconds) in microseconds, or one more than what Redis still holds of an earlier start.

    A clock may be set back between two starts, and the one before may have left without a word: its stream would then
    pass for the new one's. Raises StoreError where Redis does not tell (a busy one, say, answers with an error).
    """
    member, keys = store.keys("member", replica_id), KvKeys(store.keys, replica_id)
    word, last = await store.pipeline([("GET", member), ("XREVRANGE", keys.stream, "+", "-", "COUNT", 1)])
    for reply in (word, last):
        if isinstance(reply, StoreReplyError) and "WRONGTYPE" not in str(reply):
            raise reply
    told = read_word(store, member, word)
    found = ([] if told is None else [told.epoch]) + _of_entries(last)
    return max([int(now * 1e6), *(epoch + 1 for epoch in found if epoch < MAX_EPOCH)])


def _of_entries(reply: Reply) -> list[int]:
    with contextlib.suppress(TypeError, ValueError):  # a key of another type, or nothing at all
        return [parse_entry_id(where)[0] for where, _ in reply]
    return []
