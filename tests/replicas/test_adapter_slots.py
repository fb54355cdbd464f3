"""Adapter slots: never more than there are, never one taken from who uses it, the least used first."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from replicas.adapter_slots import AdapterSlots, Claim

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
    assert slots.claim("d") == Claim("d", "b")
    assert slots.claim("e") == Claim("e", "c")
    assert slots.claim("f") is None and not slots.has_room
    slots.unpin("a")
    assert slots.has_room and slots.claim("f") == Claim("f", "a")


def test_uses_fade_so_that_yesterday_s_favourite_makes_room() -> None:
    slots = filled(2, "old", "new")
    for _ in range(50):
        slots.used("old", 0.0)
    slots.used("new", 3600.0)
    assert slots.claim("x") == Claim("x", "old")


def test_one_that_comes_back_is_known_for_what_it_was() -> None:
    slots = filled(2, "hot", "rare")
    for at in range(10):
        slots.used("hot", float(at))
    slots.used("rare", 10.0)
    slots.pin("rare")
    assert slots.claim("flood") == Claim("flood", "hot")
    slots.failed("flood")
    slots.unpin("rare")
    slots.claim("hot")
    slots.loaded("hot")
    slots.used("rare", 11.0)
    assert slots.claim("flood") == Claim("flood", "rare"), "used last, but seldom"


def test_a_failed_load_gives_its_slot_back() -> None:
    slots = AdapterSlots(1)
    assert slots.claim("a") == Claim("a", None) and slots.claim("b") is None
    slots.failed("a")
    assert slots.claim("b") == Claim("b", None) and slots.resident == ()
    slots.loaded("b")
    assert slots.resident == ("b",)


class SlotsMachine(RuleBasedStateMachine):
    """Against a naive model: a set of loading ones and a dict of pins."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = AdapterSlots(3, half_life_s=10.0)
        self.loading: set[str] = set()
        self.pins: dict[str, int] = {}
        self.now = 0.0

    @rule(name=NAMES, later_s=st.floats(0, 30))
    def use(self, name: str, later_s: float) -> None:
        self.now += later_s
        self.slots.used(name, self.now)

    @rule(name=NAMES)
    def claim(self, name: str) -> None:
        if name in self.loading or name in self.pins:
            return
        before = dict(self.pins)
        claim = self.slots.claim(name)
        if claim is None:
            assert len(before) + len(self.loading) == 3 and all(before.values())
            return
        if claim.evicted is not None:
            assert len(before) + len(self.loading) == 3, "evicted though a slot was free"
            assert self.pins.pop(claim.evicted) == 0, "taken from who uses it"
            idle = [n for n, pins in before.items() if not pins]
            weights = self.slots._uses.weight
            assert weights(claim.evicted) == min(map(weights, idle))
        self.loading.add(name)

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), fails=st.booleans())
    def end_load(self, data: st.DataObject, fails: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.loading)))
        self.loading.remove(name)
        if fails:
            self.slots.failed(name)
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
