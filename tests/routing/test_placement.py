"""Where adapters live and what it costs to use one elsewhere: tables and properties of pure functions."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.placement import (
    MAX_OVER_MEAN,
    MAX_STRAY_S,
    PRIOR_LOAD_S,
    STRAY_LOADS,
    STRAY_USES,
    Rendezvous,
    adapter_wait_s,
    place,
    stray_s,
)
from routing.types import ReplicaState, RouteRequest

REPLICAS = [f"r{i}" for i in range(8)]


def asked(adapter: str | None = "a@1", rank: int = 8) -> RouteRequest:
    return RouteRequest("q", "m", adapter, (), 64, 100, 10, adapter_rank=rank)


def replica(**state: object) -> ReplicaState:
    return ReplicaState("r0", "m", 8192, 64, max_adapters=8, **state)  # type: ignore[arg-type]


def zipf(num: int, exponent: float) -> dict[str, float]:
    weights = {f"a{i}@1": (i + 1) ** -exponent for i in range(num)}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def loads(homes: dict[str, tuple[str, ...]], shares: dict[str, float]) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, at in homes.items():
        for replica_id in at:
            found[replica_id] += shares[name] / len(at)  # type: ignore[assignment]
    return found


@pytest.mark.parametrize(
    ("request_", "state", "expected_s"),
    [
        (asked(None), replica(), 0.0),
        (asked(), replica(adapters=frozenset({"a@1", "b@1"})), 0.0),
        (asked(), replica(adapters=("b@1",), loading=(("c@1", 9.0), ("a@1", 0.3)), adapter_load_s=2.0), 0.3),
        (asked(), replica(adapter_load_s=0.2), 0.2),
        (asked(rank=32), replica(adapter_load_s=0.2), 0.8),
        (asked(), replica(adapter_load_s=0.2, adapter_queue_s=1.5), 1.7),
        (asked(), replica(), PRIOR_LOAD_S),
        (asked("a@2"), replica(adapters=("a@1",), adapter_load_s=0.2), 0.2),
    ],
)
def test_waiting_for_an_adapter_is_nothing_what_is_left_or_queue_and_load(
    request_: RouteRequest, state: ReplicaState, expected_s: float
) -> None:
    assert adapter_wait_s(request_, state) == pytest.approx(expected_s)


@pytest.mark.parametrize(
    ("request_", "state", "homes", "expected_s"),
    [
        (asked(None), replica(adapter_load_s=1.0), ("r5",), 0.0),
        (asked(), replica(adapter_load_s=1.0), (), 0.0),
        (asked(), replica(adapter_load_s=1.0), ("r5", "r0"), 0.0),
        (asked(), replica(adapter_load_s=0.05), ("r5",), STRAY_LOADS * 0.05),
        (asked(rank=4), replica(adapter_load_s=0.05), ("r5",), STRAY_LOADS * 0.025),
        (asked(), replica(adapter_load_s=0.5), ("r5",), MAX_STRAY_S),
        (asked(rank=32), replica(adapter_load_s=0.5), ("r5",), 2.0),
        (asked(), replica(adapter_load_s=0.5, adapters=("a@1",)), ("r5",), STRAY_USES * 0.5),
    ],
)
def test_straying_from_home_harms_others_by_loads(
    request_: RouteRequest, state: ReplicaState, homes: tuple[str, ...], expected_s: float
) -> None:
    assert stray_s(request_, state, homes) == pytest.approx(expected_s)


def test_a_replica_more_moves_only_those_that_like_it_best() -> None:
    before, after = Rendezvous(REPLICAS), Rendezvous([*REPLICAS, "new"])
    moved = 0
    for i in range(900):
        name = f"a{i}@1"
        assert [r for r in after.order(name) if r != "new"] == list(before.order(name))
        moved += after.order(name)[0] == "new"
    assert 60 < moved < 140, "about a ninth"


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.2])
@pytest.mark.parametrize("num_adapters", [100, 500, 1000])
@pytest.mark.parametrize("num_replicas", [4, 8, 16, 64])
def test_placed_demand_is_balanced_and_hot_adapters_have_the_homes_they_need(
    num_replicas: int, num_adapters: int, exponent: float
) -> None:
    shares, rendezvous = zipf(num_adapters, exponent), Rendezvous([f"r{i}" for i in range(num_replicas)])
    homes = place(shares, rendezvous, {}, {})
    load = loads(homes, shares)
    assert max(load.values()) * num_replicas <= MAX_OVER_MEAN + 1e-9
    num_homes = [len(homes[f"a{i}@1"]) for i in range(num_adapters)]
    assert num_homes[-1] == 1 and num_homes[0] >= shares["a0@1"] * num_replicas / MAX_OVER_MEAN
    assert sum(num_homes) - num_adapters <= 2 * num_replicas, "copies are few"
    counts = Counter(r for at in homes.values() for r in at)
    assert max(counts.values()) <= 1.5 * sum(counts.values()) / num_replicas


def test_an_adapter_gets_more_homes_as_its_demand_grows_and_fewer_as_it_shrinks() -> None:
    rendezvous, living, homes = Rendezvous(REPLICAS), {}, {}
    seen = []
    for share in (0.02, 0.15, 0.3, 0.6, 0.3, 0.15, 0.02):
        shares = {"hot@1": share, **{f"a{i}@1": (1 - share) / 200 for i in range(200)}}
        homes = place(shares, rendezvous, living, homes)
        living = {name: at for name, at in homes.items()}
        seen.append(set(homes["hot@1"]))
    sizes = [len(at) for at in seen]
    assert sizes[0] == sizes[-1] == 1 and sizes[1] >= 2 and sizes[2] >= 3 and sizes[3] >= 5
    assert all(smaller <= larger for smaller, larger in pairwise(seen[:4])), "grown, not moved"
    assert all(later <= earlier for earlier, later in pairwise(seen[3:])), "shrunk, not moved"


@given(
    shares=st.dictionaries(st.integers(0, 300).map("a{}@1".format), st.floats(1e-9, 1.0), max_size=80),
    num_replicas=st.integers(1, 9),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_everyone_has_distinct_homes_among_the_replicas_whatever_was_before(
    shares: dict[str, float], num_replicas: int, data: st.DataObject
) -> None:
    ids = [f"r{i}" for i in range(num_replicas)]
    somewhere = st.dictionaries(
        st.sampled_from([*shares, "gone@1"]), st.lists(st.sampled_from([*ids, "dead"]), max_size=4, unique=True)
    )
    living, previous = data.draw(somewhere), data.draw(somewhere)
    homes = place(shares, Rendezvous(ids), living, {name: tuple(at) for name, at in previous.items()})
    assert homes.keys() == shares.keys()
    assert all(1 <= len(at) == len(set(at)) and set(at) <= set(ids) for at in homes.values())


def test_placing_is_a_function_of_what_it_is_given() -> None:
    shares = zipf(300, 1.0)
    first = place(shares, Rendezvous(REPLICAS), {}, {})
    assert place(dict(reversed(shares.items())), Rendezvous(REPLICAS[::-1]), {}, {}) == first
    assert place(shares, Rendezvous(REPLICAS), first, first) == first, "and stands when it is carried out"
    assert place(shares, Rendezvous([]), {}, {}) == {}


def test_small_errors_in_the_shares_move_nobody_who_is_at_home() -> None:
    shares = zipf(300, 1.0)
    homes = place(shares, Rendezvous(REPLICAS), {}, {})
    noisy = {name: share * (1.03 if i % 2 else 0.97) for i, (name, share) in enumerate(shares.items())}
    again = place(noisy, Rendezvous(REPLICAS), homes, homes)
    assert sum(not set(homes[name]) & set(again[name]) for name in shares) == 0


def test_an_adapter_without_a_living_copy_is_placed_alike_at_every_ingress() -> None:
    shares = zipf(100, 0.8)
    one, other = ({name: s * f for name, s in shares.items()} for f in (1.0, 1.001))
    assert place(one, Rendezvous(REPLICAS), {}, {}) == place(other, Rendezvous(REPLICAS), {}, {})
