"""What one replica's stream may do to a follower, without Redis."""

from __future__ import annotations

import pytest

from routing.index import PrefixIndex
from routing.kv_events import (
    FIELD,
    KvBatch,
    KvKeys,
    KvSnapshot,
    decode_batch,
    decode_snapshot,
    encode_batch,
    encode_snapshot,
    entry_id,
    pack_hashes,
    parse_entry_id,
    unpack_hashes,
)
from routing.kv_follow import MARK_S, MAX_MARKS, Follower, KvSource, LostError
from routing.store import Keys

EPOCH = 1_700_000_000_000_000


def follower() -> Follower:
    return Follower(KvSource("r", EPOCH, 64, 0), KvKeys(Keys("c"), "r"))


def entry(number: int, stored: list[int], evicted: list[int] = [], **other: int) -> tuple[bytes, dict[bytes, bytes]]:  # noqa: B006
    batch = KvBatch(
        pack_hashes(stored),
        pack_hashes(evicted),
        other.get("kv_seq", number),
        bool(other.get("resync")),
        0,
        bool(other.get("gaps")),
    )
    place = other.get("epoch", EPOCH)
    return entry_id(place, number).encode(), {FIELD: encode_batch(batch, place, number)}


def snapshot(number: int, held: list[int]) -> KvSnapshot:
    return KvSnapshot(EPOCH, number, number, 64, pack_hashes(held), 0)


def exact_index() -> PrefixIndex:
    index = PrefixIndex(1000)
    index.add("r", 100)
    index.load("r", ())
    return index


def test_formats_come_back_as_they_were_and_in_no_other_place() -> None:
    hashes = [0, 1, 2**64 - 1]
    assert unpack_hashes(pack_hashes(hashes)) == hashes
    assert parse_entry_id(entry_id(EPOCH, 7).encode()) == (EPOCH, 7)
    batch = KvBatch(pack_hashes(hashes), pack_hashes([5]), 9, False, 0)
    raw = encode_batch(batch, EPOCH, 7)
    assert unpack_hashes(decode_batch(raw, EPOCH, 7).stored) == hashes
    for epoch, number in ((EPOCH, 8), (EPOCH + 1, 7)):
        with pytest.raises(ValueError, match="not what was written"):
            decode_batch(raw, epoch, number)
    whole = encode_snapshot(KvSnapshot(EPOCH, 7, 9, 64, pack_hashes(hashes), 0))
    assert unpack_hashes(decode_snapshot(whole).hashes) == hashes
    for damaged in (whole[:-1], whole.replace(b"\xff\xff", b"\xff\xfe", 1), b"", b"\x00", b"garbage"):
        with pytest.raises(ValueError):
            decode_snapshot(damaged)


def test_entries_in_order_are_applied_evictions_first() -> None:
    index, one = exact_index(), follower()
    assert one.take([entry(1, [1, 2, 3]), entry(2, [4], evicted=[3])], index) == 2
    assert index.match([1, 2, 3]) == {"r": 2}
    assert index.match([1, 2, 4]) == {"r": 3}
    assert one.position == f"{EPOCH}-2"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (entry(3, [9]), "gap"),
        (entry(1, [9]), "gap"),
        (entry(2, [9], epoch=EPOCH - 5), "epoch"),
        (entry(2, [9], resync=1), "resync"),
        ((f"{EPOCH}-2".encode(), {FIELD: b"\x93\x01"}), "garbage"),
        ((f"{EPOCH}-2".encode(), {FIELD: entry(3, [9])[1][FIELD]}), "garbage"),
        ((f"{EPOCH}-2".encode(), {b"other": b"field"}), "garbage"),
        ((b"word", {}), "garbage"),
        ((None, None), "garbage"),
    ],
)
def test_whatever_is_not_the_next_entry_is_noticed_and_not_applied(
    bad: tuple[bytes, dict[bytes, bytes]], reason: str
) -> None:
    index, one = exact_index(), follower()
    with pytest.raises(LostError) as caught:
        one.take([entry(1, [1]), bad, entry(2, [2])], index)
    assert caught.value.reason == reason
    assert index.match([1, 2]) == {"r": 1}
    assert index.match([9]) == {}


def test_a_snapshot_and_the_entries_since_are_what_is_held() -> None:
    one = follower()
    assert one.restore(snapshot(5, [1, 2, 3]), [entry(6, [4], evicted=[2]), entry(7, [2])]) == [1, 3, 4, 2]
    assert one.position == f"{EPOCH}-7"


def test_gaps_that_a_publisher_admits_are_looked_for() -> None:
    index, one = exact_index(), follower()
    index.vouch("r")
    one.take([entry(1, list(range(64)))], index)
    one.take([entry(2, [], evicted=[20], gaps=1)], index)
    assert index.match(list(range(64))) == {"r": 20}
    assert one.gaps
    one.restore(snapshot(5, [1, 2, 3]), [entry(6, [4])])
    assert not one.gaps, "it began anew"
    one.restore(snapshot(7, [1, 2, 3]), [entry(8, [4], gaps=1), entry(9, [5])])
    assert one.gaps
    raw = encode_snapshot(KvSnapshot(EPOCH, 1, 1, 64, b"", 0, True))
    assert decode_snapshot(raw).gaps
    with pytest.raises(ValueError):
        decode_snapshot(raw.replace(b"\xc3", b"\xc2"))


@pytest.mark.parametrize(
    ("number", "entries", "reason"),
    [(5, [entry(7, [4])], "gap"), (5, [entry(6, [], resync=1)], "resync")],
)
def test_a_snapshot_that_the_stream_does_not_continue_is_of_no_use(
    number: int, entries: list[tuple[bytes, dict[bytes, bytes]]], reason: str
) -> None:
    with pytest.raises(LostError) as caught:
        follower().restore(snapshot(number, [1]), entries)
    assert caught.value.reason == reason


def test_a_snapshot_of_another_start_or_another_block_size_is_of_no_use() -> None:
    for other in (KvSnapshot(EPOCH + 1, 1, 1, 64, b"", 0), KvSnapshot(EPOCH, 1, 1, 32, b"", 0)):
        with pytest.raises(LostError):
            follower().restore(other, [])


def test_lag_is_counted_from_the_oldest_announcement_that_was_not_read() -> None:
    index, one = exact_index(), follower()
    assert one.lag_s(10.0) == 0.0
    one.announced(3, 10.0)
    one.announced(3, 10.5)
    one.announced(5, 11.0)
    assert one.lag_s(12.0) == 2.0
    one.take([entry(1, [], kv_seq=3)], index)
    assert one.lag_s(12.0) == 1.0
    one.take([entry(2, [], kv_seq=6)], index)
    assert one.lag_s(12.0) == 0.0
    one.announced(6, 13.0)
    assert one.lag_s(20.0) == 0.0


def test_a_count_that_shrank_is_that_of_a_new_start() -> None:
    """Its events have the numbers of others that nobody will ever read."""
    one = follower()
    for kv_seq in (3, 9, 12):
        one.announced(kv_seq, 10.0 + kv_seq)
    one.announced(2, 30.0)
    assert one.lag_s(31.0) == 1.0
    one.take([entry(1, [], kv_seq=2)], exact_index())
    assert one.lag_s(40.0) == 0.0


def test_announcements_that_nobody_reads_take_bounded_memory_and_never_look_younger() -> None:
    one = follower()
    for i in range(10_000):
        one.announced(i + 1, i * MARK_S / 3)
    assert len(one._marks) <= MAX_MARKS
    assert one.lag_s(1000.0) == 1000.0


def test_attempts_become_rarer_until_one_succeeds() -> None:
    one = follower()
    waits = []
    for _ in range(8):
        one.failed(100.0)
        waits.append(one.retry_at - 100.0)
    assert waits == sorted(waits) and waits[0] < 0.2 and sum(waits[:3]) < 1.0 and waits[-1] == waits[-2] < 5.0
    one.found()
    one.lost(200.0)
    assert one.retry_at == 200.0
    one.failed(200.0)
    assert one.retry_at < 200.2
