"""Adapter slots: never more than there are, never one taken from who uses it, the least used first."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from replicas.adapter_slots import AdapterSlots, Claim

MAX_RANKS = 40
NAMES = st.sampled_from([f"a{i}@1" for i in range(7)])


def filled(num_slots: int, *names: str) -> AdapterSlots:
    slots = AdapterSlots(num_slots)
    for name in names:
        slots.claim(name)
        slots.loaded(name)
    return slots


def test_the_least_used_goes_first_and_what_is_in_use_never() -> None:
    slots = filled(3, "a", "b", "c")
    for name, num_uses in (("a", 1), ("b", 2), ("c", 3)):
        for _ in range(num_uses):
            slots.used(name, 0.0)
    slots.pin("a")
    assert slots.claim("d") == Claim("d", ("b",))
    assert slots.claim("e") == Claim("e", ("c",))
    assert slots.claim("f") is None and not slots.has_room
    slots.unpin("a")
    assert slots.has_room and slots.claim("f") == Claim("f", ("a",))


def test_uses_fade_so_that_yesterday_s_favourite_makes_room() -> None:
    slots = filled(2, "old", "new")
    for _ in range(50):
        slots.used("old", 0.0)
    slots.used("new", 3600.0)
    assert slots.claim("x") == Claim("x", ("old",))


def test_one_that_comes_back_is_known_for_what_it_was() -> None:
    slots = filled(2, "hot", "rare")
    for at in range(10):
        slots.used("hot", float(at))
    slots.used("rare", 10.0)
    slots.pin("rare")
    assert slots.claim("flood") == Claim("flood", ("hot",))
    slots.failed("flood")
    slots.unpin("rare")
    slots.claim("hot")
    slots.loaded("hot")
    slots.used("rare", 11.0)
    assert slots.claim("flood") == Claim("flood", ("rare",)), "used last, but seldom"


def test_a_large_rank_takes_the_room_of_several_and_none_that_it_does_not_need() -> None:
    slots = AdapterSlots(8, max_ranks=64)
    for i, name in enumerate(("a", "b", "c", "d")):
        for _ in range(i):
            slots.used(name, 0.0)
        slots.claim(name, 16)
        slots.loaded(name)
    assert not slots._fits(1, 64, 4) and slots.has_room
    slots.pin("b")
    assert slots.claim("large", 48) == Claim("large", ("a", "c", "d"))
    slots.failed("large")
    assert slots.claim("too large", 56) is None, "b is in use"
    assert slots.claim("small", 8) == Claim("small"), "what was not evicted for the other has not gone"


def test_a_failed_load_gives_its_slot_back() -> None:
    slots = AdapterSlots(1)
    assert slots.claim("a") == Claim("a") and slots.claim("b") is None
    slots.failed("a")
    assert slots.claim("b") == Claim("b") and slots.resident == ()
    slots.loaded("b")
    assert slots.resident == ("b",)


class SlotsMachine(RuleBasedStateMachine):
    """Against a naive model: a set of loading ones and a dict of pins."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = AdapterSlots(3, half_life_s=10.0, max_ranks=MAX_RANKS)
        self.loading: set[str] = set()
        self.ranks: dict[str, int] = {}
        self.pins: dict[str, int] = {}
        self.now = 0.0

    @rule(name=NAMES, later_s=st.floats(0, 30))
    def use(self, name: str, later_s: float) -> None:
        self.now += later_s
        self.slots.used(name, self.now)

    def fits(self, rank: int, *gone: str) -> bool:
        """Whether a rank would fit without `gone`."""
        left = {n: r for n, r in self.ranks.items() if n not in gone}
        return len(left) < 3 and sum(left.values()) + rank <= MAX_RANKS

    @rule(name=NAMES, rank=st.sampled_from([4, 8, 32]))
    def claim(self, name: str, rank: int) -> None:
        if name in self.loading or name in self.pins:
            return
        idle = [n for n, pins in self.pins.items() if not pins]
        claim = self.slots.claim(name, rank)
        if claim is None:
            assert not self.fits(rank, *idle)
            return
        assert self.fits(rank, *claim.evicted)
        assert not claim.evicted or not self.fits(rank, *claim.evicted[:-1]), "evicted though there was room"
        weights = self.slots._uses.weight
        assert sorted(map(weights, idle))[: len(claim.evicted)] == [weights(n) for n in claim.evicted]
        for evicted in claim.evicted:
            assert self.pins.pop(evicted) == 0, "taken from who uses it"
            del self.ranks[evicted]
        self.loading.add(name)
        self.ranks[name] = rank

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), fails=st.booleans())
    def end_load(self, data: st.DataObject, fails: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.loading)))
        self.loading.remove(name)
        if fails:
            self.slots.failed(name)
            del self.ranks[name]
        else:
            self.slots.loaded(name)
            self.pins[name] = 0

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.pins)))
        self.slots.pin(name)
        self.pins[name] += 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, pins in self.pins.items() if pins)))
        self.slots.unpin(name)
        self.pins[name] -= 1

    @invariant()
    def agrees(self) -> None:
        self.slots.check()
        assert set(self.slots.resident) == self.pins.keys()
        assert all(self.slots.is_resident(n) and self.slots.is_in_use(n) == bool(p) for n, p in self.pins.items())


TestSlotsMachine = SlotsMachine.TestCase
TestSlotsMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
