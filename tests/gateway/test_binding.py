"""Late binding: request and replica are chosen together, nobody starves, tenants stay within their bound."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import ModelConfig
from gateway.binding import FRESH_S, MAX_HELD_S, PATIENCE, TURN_S, LookAhead, Nobody, Outlook, Pair, has_place
from gateway.fair_queue import INPUT_WEIGHT, OUTPUT_WEIGHT, Charge, FairQueue
from gateway.types import Job, Tenant
from replicas.contract import SamplingParams
from routing.types import Decision, ReplicaState, RouteRequest, Snapshot
from routing.waiting import merged, pending_of
from routing.warm import warm

MODEL = ModelConfig(id="m", source="sim:bytes")
RATE = 1000.0
BLOCK = 10


@dataclass(eq=False)
class Asked:
    """One who waits. `warm_at`: where so many of its tokens are cached."""

    job: Job
    num_uncached: int
    route: RouteRequest
    due: float = 0.0
    warm_at: dict[str, int] = field(default_factory=dict)
    since: float = 0.0
    expires: float = inf
    outlook: Outlook | None = None


def asked(
    name: str, num_tokens: int = 1000, tenant: str = "t", *, weight: float = 1.0, due: float = 0.0, max_tokens: int = 1,
    warm_at: dict[str, int] | None = None, priority: int = 0,
) -> Asked:  # fmt: skip
    sampling = SamplingParams(max_tokens=max_tokens, seed=0)
    job = Job(name, MODEL, Tenant(tenant, b"", weight), b"", sampling, b"", priority=priority)
    route = RouteRequest(name, "m", None, tuple(range(num_tokens // BLOCK)), BLOCK, num_tokens, max_tokens, tenant)
    return Asked(job, num_tokens, route, due, warm_at or {})


def replica(replica_id: str, *pending: int, **changes: object) -> ReplicaState:
    """One that computes RATE tokens a second, has prompts of these sizes pending and wants 512 tokens ahead."""
    state: dict[str, object] = {
        "replica_id": replica_id, "model": "m", "max_model_len": 1 << 20, "max_num_seqs": 64, "num_places": 8,
        "wanted_tokens": 512, "prefill_tokens_per_s": RATE, "step_time_s": 0.01, "prefill_order": "shortest",
        "num_waiting": len(pending), "num_waiting_tokens": sum(pending), "pending": pending_of(merged((), pending)),
    }  # fmt: skip
    return ReplicaState(**(state | changes))  # type: ignore[arg-type]


class Yard:
    """Replicas as the test wants them, and the policy `warm`."""

    def __init__(self, *states: ReplicaState) -> None:
        self.now = 100.0
        self.all = states
        self.queue: FairQueue[Asked] = FairQueue()
        self.waiting: dict[str, Asked] = {}
        self.num_weighed = 0
        self._choosers: dict[int, LookAhead] = {}

    def states(self) -> tuple[ReplicaState, ...]:
        return self.all

    def weigh(self, route: RouteRequest, replicas: tuple[ReplicaState, ...]) -> Decision:
        self.num_weighed += 1
        matched = {k: v // BLOCK for k, v in self.waiting[route.request_id].warm_at.items()}
        return warm(route, Snapshot(replicas, matched))

    def push(self, *all_asked: Asked) -> None:
        for each in all_asked:
            each.since = self.now
            self.waiting[each.job.request_id] = each
            self.queue.push(each, each.due)

    def look(self, limit: int = 8) -> str:
        """ "request>replica" of who goes (and takes it out), or "nobody"."""
        found = self._choosers.setdefault(limit, LookAhead(limit))(self.queue, self)
        if isinstance(found, Nobody):
            assert found.until > self.now, "else whoever sleeps until then never sleeps"
            return "nobody"
        self.queue.take(found.waiting)
        assert found.decision is not None
        return f"{found.waiting.job.request_id}>{found.decision.replica_id}"


def test_who_is_next_goes_where_it_is_best_off() -> None:
    yard = Yard(replica("a"), replica("b"))
    yard.push(asked("r", warm_at={"b": 800}))
    assert yard.look() == "r>b"
    assert yard.look() == "nobody"


def test_a_request_waits_for_its_warm_replica_and_one_behind_it_takes_the_free_place() -> None:
    yard = Yard(replica("a", 600), replica("b"))
    yard.push(asked("warm", 4000, warm_at={"a": 3900}), asked("cold"))
    busy = replica("a", 600, wanted_tokens=0, full=True)
    yard.all = (busy, replica("b"))
    assert yard.look() == "cold>b"
    assert yard.look() == "nobody", "running cold would cost 3.9 s more than waiting for 0.6 s"
    yard.all = (replica("a", 100), replica("b"))
    assert yard.look() == "warm>a"


def test_waiting_for_the_warm_one_ends_after_what_it_would_save() -> None:
    yard = Yard(replica("a", full=True, wanted_tokens=0), replica("b"))
    yard.push(asked("r", 1000, warm_at={"a": 900}))
    began = yard.now
    saved_s = 0.9 * 3  # its own prefill and the harm of it, twice
    while yard.look() == "nobody":
        assert yard.now - began <= PATIENCE * saved_s + 2 * FRESH_S
        yard.now += FRESH_S / 2
    assert yard.now - began == pytest.approx(PATIENCE * saved_s, rel=0.1)
    assert not yard.queue


def test_nobody_is_held_longer_than_the_bound_however_much_it_would_save() -> None:
    yard = Yard(replica("a", full=True, wanted_tokens=0), replica("b"))
    yard.push(asked("r", 100_000, warm_at={"a": 99_000}))
    assert yard.look() == "nobody"
    yard.now += MAX_HELD_S
    assert yard.look() == "r>b"


def test_a_replica_that_leaves_is_waited_for_no_longer() -> None:
    yard = Yard(replica("a", full=True, wanted_tokens=0), replica("b"))
    yard.push(asked("r", 1000, warm_at={"a": 900}))
    assert yard.look() == "nobody"
    yard.all = (replica("a", full=True, wanted_tokens=0, draining=True), replica("b"))
    yard.now += FRESH_S
    assert yard.look() == "r>b"


def test_replicas_are_compared_anew_only_now_and_then() -> None:
    yard = Yard(replica("a", full=True, wanted_tokens=0), replica("b", full=True, wanted_tokens=0), replica("c"))
    yard.push(*(asked(f"r{i}", 4000, warm_at={"a": 3900}) for i in range(50)))
    for _ in range(10):
        assert yard.look(limit=16) == "nobody"
    assert yard.num_weighed == 16
    yard.now += FRESH_S
    assert yard.look(limit=16) == "nobody"
    assert yard.num_weighed == 32


def test_a_request_that_nobody_can_take_is_let_go_to_be_told_so() -> None:
    yard = Yard(replica("a", max_model_len=100))
    yard.push(asked("r", 1000))
    assert yard.look() == "r>None"


def test_a_short_prompt_has_a_place_where_a_long_one_must_wait() -> None:
    state = replica("a", 300, 300)
    assert has_place(state, 20, 0.0)
    assert not has_place(state, 4000, 0.0)
    assert has_place(state, 4000, 100.0), "it is long overdue"
    first_come = replica("a", 300, 300, prefill_order="fcfs")
    assert not has_place(first_come, 20, 0.0)
    assert has_place(replica("a", 300, prefill_order="fcfs"), 4000, 0.0)
    assert not has_place(replica("a", num_places=0), 20, 0.0)


def test_a_replica_that_does_not_say_what_it_wants_has_a_place_until_it_is_full() -> None:
    assert has_place(replica("a", 10_000, wanted_tokens=0, num_places=0), 4000, 0.0)
    assert not has_place(replica("a", wanted_tokens=0, full=True), 4000, 0.0)


def test_of_one_tenant_who_is_due_first_goes_first() -> None:
    yard = Yard(replica("a"))
    yard.push(asked("long", 5000, due=30.0), asked("short", 100, due=1.0), asked("long too", 5000, due=30.0))
    assert [yard.look() for _ in range(3)] == ["short>a", "long>a", "long too>a"]


def test_a_place_that_fairness_keeps_from_the_others_goes_to_the_head() -> None:
    """The head waits for its warm replica; whoever would pass it has had its share: then nobody idles for that."""
    yard = Yard(replica("a", full=True, wanted_tokens=0), replica("b"))
    yard.push(asked("head", 1000, "poor", warm_at={"a": 900}))
    yard.push(*(asked(f"r{i}", 1000, "rich") for i in range(3)))
    assert yard.look() == "r0>b", "one request of its size may pass"
    assert yard.look() == "head>b"
    assert yard.look() == "r1>b"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from((20, 200, 2000)), min_size=2, max_size=4),
    weights=st.lists(st.sampled_from((0.5, 1.0, 4.0)), min_size=4, max_size=4),
    limit=st.sampled_from((1, 4, 16)),
)
def test_backlogged_tenants_stay_within_the_bound_whoever_is_passed(
    seed: int, sizes: list[int], weights: list[float], limit: int
) -> None:
    """Over any interval, service for weight differs by at most twice the dearest request for its tenant's weight: the
    bound of virtual token counters where a request's answer is served with its prompt."""
    random = Random(seed)
    tenants = {f"t{i}": (size, weights[i]) for i, size in enumerate(sizes)}
    served = dict.fromkeys(tenants, 0.0)
    widest: dict[tuple[str, str], list[float]] = {(a, b): [0.0, 0.0] for a in tenants for b in tenants if a < b}
    yard = Yard()
    running: list[tuple[Asked, Charge]] = []

    def push(tenant: str) -> None:
        size, weight = tenants[tenant]
        num_tokens = random.randint(max(11, size // 2), size)
        warm_at = {random.choice("abc"): num_tokens * 9 // 10}
        yard.push(asked(f"{tenant}/{len(yard.waiting)}", num_tokens, tenant, weight=weight, warm_at=warm_at,
                        due=yard.now + random.random()))  # fmt: skip

    for tenant in tenants:
        for _ in range(3):
            push(tenant)
    bound = 2 * max((INPUT_WEIGHT * size + OUTPUT_WEIGHT) / weight for size, weight in tenants.values())
    for _ in range(150):
        yard.now += random.random() * 0.2
        yard.all = tuple(replica(r, *[500] * random.randint(0, 2), num_places=random.randint(0, 1)) for r in "abc")
        found = LookAhead(limit)(yard.queue, yard)
        if isinstance(found, Pair):
            tenant = found.waiting.job.tenant.tenant_id
            running.append((found.waiting, yard.queue.take(found.waiting)))
            served[tenant] += (INPUT_WEIGHT * found.waiting.num_uncached + OUTPUT_WEIGHT) / tenants[tenant][1]
            push(tenant)
        for (a, b), seen in widest.items():
            seen[0], seen[1] = min(seen[0], served[a] - served[b]), max(seen[1], served[a] - served[b])
        yard.queue.check()
    for pair, (low, high) in widest.items():
        assert high - low <= bound + 1e-6, f"{pair}: {high - low=} {bound=}"


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32), tenants=st.sampled_from(("a", "ab", "abcd")))
def test_the_head_never_starves_however_many_pass_it(seed: int, tenants: str) -> None:
    """A long prompt that is warm at a replica without places, among endless short ones that are not: its handicap, as
    at any replica that orders by size, and then no longer than it may be held."""
    random = Random(seed)
    handicap_s = 12.0
    yard = Yard(replica("busy", full=True, wanted_tokens=0), replica("free"))
    head = asked("head", 2000, tenants[0], due=yard.now + handicap_s, warm_at={"busy": 1990})
    yard.push(head)
    num = 0
    began = yard.now
    gone = ""
    while not gone.startswith("head"):
        waited_s = yard.now - began
        backlog_s = 20 * 0.1 * len(tenants) + 0.3  # of its own tenant's who were due before it
        assert waited_s <= handicap_s + backlog_s + MAX_HELD_S + 1.0, "it was held beyond its bound"
        while len(yard.queue) < 20:
            num += 1
            yard.push(asked(f"s{num}", random.randint(20, 60), random.choice(tenants), due=yard.now + 0.3))
        gone = yard.look(limit=8)
        yard.now += 0.1


def test_an_overdue_prompt_gets_its_place_among_endless_shorter_ones() -> None:
    """Every replica always has more short tokens pending than it wants ahead of a long prompt."""
    yard = Yard(replica("a", *[50] * 20), replica("b", *[50] * 20))
    long_one = asked("long", 3000, due=yard.now + 18.0)
    yard.push(long_one)
    began = yard.now
    while yard.look() == "nobody":
        yard.now += 0.1
        assert yard.now < began + 18.0 + 20.0
    assert yard.now >= began + 18.0, "the short ones go first while it is not overdue"


def test_a_place_that_comes_free_is_used_in_turn_but_who_has_just_come_goes_at_once() -> None:
    """Ingresses hear of a free place in the same moment; the second in turn lets the first one have it."""
    yard = Yard(replica("a", num_places=0))
    yard.push(asked("r"))
    assert yard.look() == "nobody"
    yard.now += 1.0
    yard.all = (replica("a", turn=2),)
    assert yard.look() == "nobody"
    yard.now += 1.5 * TURN_S
    assert yard.look() == "nobody"
    yard.now += TURN_S
    assert yard.look() == "r>a"
    yard.push(asked("newcomer"))
    assert yard.look() == "newcomer>a"


def test_a_place_that_somebody_else_took_in_turn_is_not_used_later() -> None:
    yard = Yard(replica("a", num_places=0))
    yard.push(asked("r"))
    yard.now += 1.0
    yard.all = (replica("a", turn=1),)
    assert yard.look() == "nobody"
    yard.all = (replica("a", 4000, turn=1, prefill_order="fcfs"),)
    yard.now += 2 * TURN_S
    assert yard.look() == "nobody"
    yard.all = (replica("a", turn=1),)
    assert yard.look() == "nobody", "its turn begins anew"
    yard.now += 2 * TURN_S
    assert yard.look() == "r>a"


def test_newcomers_do_not_pass_who_waits_for_its_turn() -> None:
    """Each time the place comes free another ingress goes first; newcomers at the same ingress take turns, too."""
    yard = Yard(replica("a", num_places=0))
    yard.push(asked("first"))
    assert yard.look() == "nobody"
    yard.now += 1.0
    yard.all = (replica("a", turn=1),)
    yard.push(asked("newcomer"))
    assert yard.look() == "nobody"
    yard.now += 2 * TURN_S
    assert yard.look() == "first>a"


def test_a_turn_begins_anew_after_no_replica_had_a_place() -> None:
    yard = Yard(replica("a", num_places=0))
    yard.push(asked("r"))
    yard.now += 1.0
    for _ in range(3):
        yard.all = (replica("a", turn=1),)
        assert yard.look() == "nobody"
        yard.all = (replica("a", turn=1, num_places=0),)
        yard.now += 2 * TURN_S
        assert yard.look() == "nobody"
    yard.all = (replica("a", turn=1),)
    assert yard.look() == "nobody"
    yard.now += 2 * TURN_S
    assert yard.look() == "r>a"


def test_the_head_does_not_starve_when_other_places_come_free_for_a_moment_only() -> None:
    """Its warm replica is stuck; another one has a place now and then, which newcomers take at once."""
    yard = Yard(replica("stuck", full=True, wanted_tokens=0), replica("b", num_places=0))
    yard.push(asked("head", 20_000, warm_at={"stuck": 19_900}))
    began, num, gone = yard.now, 0, ""
    while gone != "head>b":
        assert yard.now - began < MAX_HELD_S + 1.0, f"{num} have passed"
        yard.push(asked(f"n{num}", 20, due=yard.now))
        yard.all = (yard.all[0], replica("b"))
        gone = yard.look()
        yard.all = (yard.all[0], replica("b", num_places=0))
        assert yard.look() == "nobody"
        yard.now += 0.12
        num += 1


def test_nobody_is_held_until_its_wait_ends_in_an_error() -> None:
    yard = Yard(replica("a", full=True, wanted_tokens=0), replica("b"))
    hurried = asked("r", 10_000, warm_at={"a": 9_900})
    hurried.expires = yard.now + 35.0
    yard.push(hurried)
    began = yard.now
    while yard.look() == "nobody":
        yard.now += FRESH_S / 2
    cost_s = 10.0 * 3  # its prefill at b, and the harm of it
    assert yard.now - began <= 35.0 - cost_s + 2 * FRESH_S


@pytest.mark.parametrize("trouble", [{"draining": True}, {"breaker_open": True}])
def test_nobody_leaves_while_every_replica_drains_or_fails(trouble: dict[str, bool]) -> None:
    yard = Yard(replica("a", **trouble), replica("small", max_model_len=100))
    yard.push(*(asked(f"r{i}") for i in range(20)))
    for _ in range(100):
        assert yard.look() == "nobody"
        yard.now += FRESH_S
    yard.all = (replica("a", wanted_tokens=512, num_places=1),)
    assert yard.look() == "r0>a"


def test_a_free_place_is_used_by_the_less_urgent_while_the_urgent_wait_for_their_warm_replica() -> None:
    yard = Yard(replica("a", full=True, wanted_tokens=0), replica("b"))
    yard.push(asked("urgent", 4000, "u", warm_at={"a": 3900}), asked("later", 1000, "l", priority=1))
    assert yard.look() == "later>b"
    yard.all = (replica("a"), replica("b", num_places=0))
    assert yard.look() == "urgent>a"


def test_who_may_not_pass_and_a_head_that_fits_nowhere_are_looked_at_again_later_not_at_once() -> None:
    """The place is for short prompts only; the short one behind has had more than its share."""
    yard = Yard(replica("a", 600, turn=1))
    yard.push(asked("head", 5000, "poor", due=yard.now + 100.0))
    yard.push(asked("short", 20, "rich"))
    yard.queue.served_elsewhere("rich", 900_000.0)
    for _ in range(10):
        yard.now += 0.02
        assert yard.look() == "nobody"  # `until` is checked there
