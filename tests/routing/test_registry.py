"""Membership over a real Valkey: announced, withdrawn, expired, forgotten by Redis, hidden by its faults."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable

import pytest

from routing.registry import Announcement, Load, Member, Members, MemberWatch, RegistryOptions
from routing.store import Store, StoreError, StoreOptions
from tests.routing.conftest import Valkey

QUICK = RegistryOptions(ttl_s=0.6, announce_s=0.1, poll_s=0.05)
PATIENT = RegistryOptions(ttl_s=2.0, announce_s=0.1, poll_s=0.05)
"""A member that a busy machine keeps from speaking for a second is still one."""


def member(replica_id: str, *, epoch: int = 1, endpoint: str = "unix:///run/r.sock", start_id: str = "") -> Member:
    return Member(
        replica_id=replica_id,
        group="g",
        model="m",
        endpoint=endpoint,
        epoch=epoch,
        host_id="node-1",
        pid=os.getpid(),
        started_at=1700000000.0,
        engine="sim",
        start_id=start_id,
    )


class Fleet:
    """Announcements and watches on one server, all closed at the end."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.announcements: list[Announcement] = []
        self.watches: list[MemberWatch] = []
        self.stores: list[Store] = []

    def store(self, cluster: str = "test", timeout_s: float = 2.0) -> Store:
        self.stores.append(Store(self.url, cluster, StoreOptions(timeout_s=timeout_s, open_s=0.2)))
        return self.stores[-1]

    def announce(self, member: Member, options: RegistryOptions = QUICK, cluster: str = "test") -> Announcement:
        announcement = Announcement(
            self.store(cluster, 0.1), member, lambda: Load(num_running=3, num_blocks=64), options
        )
        self.announcements.append(announcement)
        announcement.start()
        return announcement

    def watch(self, options: RegistryOptions = QUICK, cluster: str = "test") -> MemberWatch:
        watch = MemberWatch(self.store(cluster, 0.1), options)
        self.watches.append(watch)
        watch.start()
        return watch

    async def vanish(self, announcement: Announcement) -> None:
        """What a killed replica does: it just stops."""
        task, announcement._task = announcement._task, None
        assert task is not None
        task.cancel()
        await asyncio.wait([task])

    async def close(self) -> None:
        for watch in self.watches:
            await watch.close()
        for announcement in self.announcements:
            await announcement.withdraw()
        for store in self.stores:
            await store.close()


@pytest.fixture
async def fleet(valkey: Valkey) -> AsyncIterator[Fleet]:
    fleet = Fleet(valkey.url)
    yield fleet
    await fleet.close()


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> float:
    began = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return time.monotonic() - began


async def test_a_new_member_is_seen_within_a_second_and_whole_with_the_default_times(fleet: Fleet) -> None:
    watch = fleet.watch(RegistryOptions())
    await until(lambda: watch.age_s is not None)
    fleet.announce(member("a"), RegistryOptions(ttl_s=30, announce_s=10))  # its first word comes at once
    assert RegistryOptions().poll_s <= 0.25
    assert await until(lambda: watch.members) < 2.0, "a second, and one that the machine may stand still"
    assert watch.members == {"a": member("a")}


async def test_callbacks_get_the_whole_set_once_per_change(fleet: Fleet) -> None:
    seen: list[list[str]] = []
    watch = fleet.watch()
    watch.subscribe(lambda members: seen.append(sorted(members)))
    first = fleet.announce(member("a"))
    await until(lambda: seen == [["a"]])
    fleet.announce(member("b"))
    await until(lambda: seen[-1] == ["a", "b"])
    await asyncio.sleep(0.3)  # renewals are no changes
    await first.withdraw()
    await until(lambda: seen[-1] == ["b"])
    assert seen == [["a"], ["a", "b"], ["b"]]
    late: list[Members] = []
    watch.subscribe(late.append)
    assert [sorted(members) for members in late] == [["b"]]


async def test_a_withdrawn_member_is_gone_at_the_next_poll_not_at_its_expiry(fleet: Fleet) -> None:
    slow = RegistryOptions(ttl_s=30, announce_s=0.1, poll_s=0.05)
    watch = fleet.watch(slow)
    announcement = fleet.announce(member("a"), slow)
    await until(lambda: watch.members)
    await announcement.withdraw()
    await announcement.withdraw()
    assert await until(lambda: not watch.members, 10.0) < 5.0


async def test_a_member_that_just_stops_expires(fleet: Fleet, valkey: Valkey) -> None:
    watch = fleet.watch()
    announcement = fleet.announce(member("a"))
    await until(lambda: watch.members)
    await fleet.vanish(announcement)
    assert await until(lambda: not watch.members, 30.0) > 0.3
    await until(lambda: valkey.raw("SMEMBERS", "wg:{test}:members") in (b"*0\r\n", b"~0\r\n"))


async def test_a_redis_emptied_or_restarted_loses_no_live_member(fleet: Fleet, valkey: Valkey) -> None:
    changes: list[list[str]] = []
    watch = fleet.watch()
    fleet.announce(member("a"))
    fleet.announce(member("b"))
    await until(lambda: len(watch.members) == 2)
    watch.subscribe(lambda members: changes.append(sorted(members)))
    changes.clear()
    valkey.raw("FLUSHALL")
    await asyncio.sleep(0.3)
    valkey.kill()
    await asyncio.sleep(0.3)
    valkey.start()
    newcomer = fleet.watch()
    assert await until(lambda: len(newcomer.members) == 2) < 2.0, "they announce themselves again"
    await asyncio.sleep(0.7)
    assert sorted(watch.members) == ["a", "b"]
    assert changes == []


async def test_while_redis_is_frozen_the_last_set_stays_and_the_loop_is_free(fleet: Fleet, valkey: Valkey) -> None:
    watch = fleet.watch()
    fleet.announce(member("a"))
    await until(lambda: watch.members)
    valkey.signal(signal.SIGSTOP)
    try:
        gaps: list[float] = []
        for _ in range(100):  # a second at least, longer than the time to live
            before = time.monotonic()
            assert sorted(watch.members) == ["a"]
            await asyncio.sleep(0.01)
            gaps.append(time.monotonic() - before)
        gaps.sort()
        assert gaps[-3] < 0.2 and gaps[len(gaps) // 2] < 0.05, "reading the set never waits; the machine may, twice"
        assert watch.age_s is not None
        assert watch.age_s > 0.5
    finally:
        valkey.signal(signal.SIGCONT)
    await until(lambda: watch.age_s is not None and watch.age_s < 0.2)
    assert sorted(watch.members) == ["a"]


async def test_members_can_be_announced_before_redis_is_there(fleet: Fleet, valkey: Valkey) -> None:
    valkey.kill()
    watch = fleet.watch()
    announcement = fleet.announce(member("a"))
    await asyncio.sleep(0.2)
    assert watch.members == {}
    assert watch.age_s is None
    with pytest.raises(StoreError):
        await watch.refresh()
    valkey.start()
    await until(lambda: watch.members)
    valkey.kill()
    began = time.monotonic()
    await announcement.withdraw()
    assert time.monotonic() - began < 3.0, "withdrawing gives up on a dead Redis"


@pytest.mark.parametrize(
    "garbage", [b"", b"\xff\x00", b"[]", b'{"kind":"member"}', b'{"kind":"member","replica_id":7}']
)
async def test_a_garbage_value_hides_nobody_and_costs_no_exception(
    fleet: Fleet, valkey: Valkey, garbage: bytes
) -> None:
    watch = fleet.watch()
    fleet.announce(member("good"))
    hidden = fleet.announce(member("hidden"))
    await until(lambda: len(watch.members) == 2)
    await fleet.vanish(hidden)
    valkey.raw("SET", "wg:{test}:member:hidden", garbage)
    store = watch._store
    await until(lambda: store.num_bad_values > 2)
    assert sorted(watch.members) == ["good", "hidden"], "garbage is no proof that a member is gone"
    await until(lambda: sorted(watch.members) == ["good"])
    fleet.announce(member("hidden", epoch=2))
    await until(lambda: sorted(watch.members) == ["good", "hidden"])


async def test_keys_of_another_type_are_put_right_by_those_who_announce(fleet: Fleet, valkey: Valkey) -> None:
    watch = fleet.watch()
    fleet.announce(member("a"))
    await until(lambda: watch.members)
    valkey.raw("SET", "wg:{test}:members", "not a set")
    valkey.raw("DEL", "wg:{test}:member:a")
    valkey.raw("LPUSH", "wg:{test}:member:a", "not a string")
    newcomer = fleet.watch()
    await until(lambda: sorted(newcomer.members) == ["a"])
    assert sorted(watch.members) == ["a"]


async def test_ids_that_are_no_ids_and_values_of_someone_else_are_skipped(fleet: Fleet, valkey: Valkey) -> None:
    watch = fleet.watch()
    valkey.raw("SADD", "wg:{test}:members", b"\xff\xfe", "ghost", "")
    fleet.announce(member("a"))
    await until(lambda: watch.members)
    value = valkey.raw("GET", "wg:{test}:member:a").split(b"\r\n")[1]
    valkey.raw("SET", "wg:{test}:member:ghost", value)
    await asyncio.sleep(0.2)
    assert sorted(watch.members) == ["a"]


async def test_two_clusters_on_one_redis_never_see_each_other(fleet: Fleet) -> None:
    blue, green = fleet.watch(cluster="blue"), fleet.watch(cluster="green")
    fleet.announce(member("b"), cluster="blue")
    announcement = fleet.announce(member("g"), cluster="green")
    await until(lambda: blue.members and green.members)
    await announcement.withdraw()
    await until(lambda: not green.members)
    assert sorted(blue.members) == ["b"]


async def test_a_late_word_of_an_older_epoch_counts_for_nothing(fleet: Fleet) -> None:
    watch = fleet.watch()
    old = fleet.announce(member("a", epoch=1))
    await until(lambda: watch.members)
    new = fleet.announce(member("a", epoch=2, endpoint="unix:///run/new.sock"))
    await until(lambda: watch.members["a"].epoch == 2)
    await old.withdraw()
    await asyncio.sleep(0.3)
    assert watch.members["a"].endpoint == "unix:///run/new.sock"
    await new.withdraw()
    await until(lambda: not watch.members)


async def test_who_is_connected_to_a_start_believes_it_though_its_clock_was_set_back(fleet: Fleet) -> None:
    connected: dict[str, str] = {}
    watch = MemberWatch(fleet.store(), QUICK, connected.get)
    fleet.watches.append(watch)
    watch.start()
    before = fleet.announce(member("a", epoch=7, start_id="before"))
    await until(lambda: watch.members)
    await fleet.vanish(before)
    await fleet.store().execute("FLUSHALL")  # so nothing told the next start of an epoch that it must exceed
    connected["a"] = "after"
    fleet.announce(member("a", epoch=4, start_id="after"))
    await until(lambda: [m.start_id for m in watch.members.values()] == ["after"])


async def test_two_starts_that_both_speak_are_told_apart_by_the_connection_and_do_not_take_turns(fleet: Fleet) -> None:
    watch = MemberWatch(fleet.store(), PATIENT, {"a": "living"}.get)
    fleet.watches.append(watch)
    seen: list[str] = []
    watch.subscribe(lambda members: seen.extend(member.start_id for member in members.values()))
    cut_off = fleet.announce(member("a", epoch=7, start_id="cut off"), PATIENT)
    watch.start()
    await until(lambda: seen)
    fleet.announce(member("a", epoch=4, start_id="living"), PATIENT)
    await until(lambda: seen == ["cut off", "living"], 20.0)  # whose word is soon written over by the other's
    await asyncio.sleep(1.0)  # ten words of that
    assert seen == ["cut off", "living"]
    await cut_off.withdraw()
    await asyncio.sleep(0.3)
    assert seen == ["cut off", "living"]


async def test_a_peer_that_does_not_say_which_start_it_is_goes_by_its_epoch(fleet: Fleet) -> None:
    watch = MemberWatch(fleet.store(), QUICK, {"a": ""}.get)
    fleet.watches.append(watch)
    watch.start()
    before = fleet.announce(member("a", epoch=7))
    await until(lambda: watch.members)
    await fleet.vanish(before)
    fleet.announce(member("a", epoch=4))
    assert await until(lambda: watch.members["a"].epoch == 4) > QUICK.ttl_s / 2


async def test_a_value_too_deep_to_decode_does_not_end_the_watch(fleet: Fleet) -> None:
    watch = fleet.watch()
    deep = b'{"kind":"member","x":' + b"[" * 5000 + b"]" * 5000 + b"}"
    await fleet.store().execute("SET", "wg:{test}:member:deep", deep)
    await fleet.store().execute("SADD", "wg:{test}:members", "deep")
    await asyncio.sleep(0.2)
    fleet.announce(member("a"))
    await until(lambda: sorted(watch.members) == ["a"])


async def test_who_is_connected_to_nothing_believes_an_older_epoch_once_the_later_one_is_silent(fleet: Fleet) -> None:
    watch = fleet.watch(PATIENT)
    before = fleet.announce(member("a", epoch=7, start_id="before"), PATIENT)
    await until(lambda: watch.members)
    after = fleet.announce(member("a", epoch=4, start_id="after"), PATIENT)
    await asyncio.sleep(1.5 * PATIENT.ttl_s)
    assert watch.members["a"].start_id == "before", "both speak: the epoch decides"
    await fleet.vanish(before)
    assert await until(lambda: watch.members["a"].start_id == "after", 10.0) > PATIENT.ttl_s / 2
    await after.withdraw()
    await until(lambda: not watch.members)


async def test_an_older_start_notices_the_later_ones_word_and_speaks_less_often(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (Announcement(fleet.store(), member("a", epoch=epoch), Load, QUICK) for epoch in (1, 2))
    assert not await old._say(old.member)
    assert not await new._say(new.member), "an older word is nothing to mind"
    pauses: list[float] = []

    async def beat(store: Store, period_s: float) -> None:
        pauses.append(period_s)
        await asyncio.sleep(0.01)

    monkeypatch.setattr(Store, "beat", beat)
    old.start()
    await until(lambda: len(pauses) >= 3)
    assert pauses[:3] == [QUICK.ttl_s / 2, QUICK.announce_s, QUICK.announce_s], "as long as the later one speaks"
    await old.withdraw()


async def test_a_failing_callback_does_not_end_the_watch(fleet: Fleet) -> None:
    watch = fleet.watch()
    seen: list[int] = []
    watch.subscribe(lambda members: [][1])
    watch.subscribe(lambda members: seen.append(len(members)))
    fleet.announce(member("a"))
    await until(lambda: seen == [1])
    fleet.announce(member("b"))
    await until(lambda: seen == [1, 2])


async def test_closing_leaves_no_task_behind(valkey: Valkey) -> None:
    before = asyncio.all_tasks()
    fleet = Fleet(valkey.url)
    watch = fleet.watch()
    fleet.announce(member("a"))
    await until(lambda: watch.members)
    await fleet.close()
    await watch.close()
    assert asyncio.all_tasks() == before
    assert sorted(watch.members) == ["a"], "the last set stays readable"


async def test_a_replicas_load_is_there_for_who_is_not_connected_to_it(fleet: Fleet) -> None:
    watch = fleet.watch()
    announcement = fleet.announce(member("a"))
    await until(lambda: watch.members)
    assert await watch.loads() == {"a": Load(num_running=3, num_blocks=64)}
    await announcement.withdraw()
    await until(lambda: not watch.members)
    assert await fleet.store().execute("EXISTS", "wg:{test}:load:a") == 0


async def test_a_load_that_cannot_be_told_does_not_silence_the_member(fleet: Fleet) -> None:
    def broken() -> Load:
        raise RuntimeError("the engine is dead")

    announcement = Announcement(fleet.store(), member("a"), broken, QUICK)
    fleet.announcements.append(announcement)
    announcement.start()
    watch = fleet.watch()
    await until(lambda: watch.members)
    assert await watch.loads() == {}


async def test_a_member_that_only_redis_lost_stays_while_somebody_is_connected_to_it(fleet: Fleet) -> None:
    connected = {"a": ""}
    watch = MemberWatch(fleet.store(), QUICK, connected.get)
    fleet.watches.append(watch)
    watch.start()
    announcement = fleet.announce(member("a"))
    await until(lambda: watch.members)
    await fleet.vanish(announcement)  # as when Redis refuses its writes
    await asyncio.sleep(3 * QUICK.ttl_s)
    assert set(watch.members) == {"a"}
    connected.clear()
    await until(lambda: not watch.members)


async def test_a_withdrawn_member_goes_though_somebody_is_still_connected_to_it(fleet: Fleet) -> None:
    watch = MemberWatch(fleet.store(), QUICK, lambda replica_id: "")
    fleet.watches.append(watch)
    watch.start()
    announcement = fleet.announce(member("a"))
    await until(lambda: watch.members)
    await announcement.withdraw()
    await until(lambda: not watch.members)
