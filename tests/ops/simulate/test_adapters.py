"""LoRA slots in virtual time."""

from __future__ import annotations

from math import inf

from ops.simulate.adapters import SimAdapters
from ops.simulate.replica import ReplicaSpec, SimReplica
from ops.simulate.trace import TraceRequest
from ops.simulate.work import Work

LOAD_S = 0.4


def work(adapter: str | None, rank: int = 8, num_output: int = 1) -> Work:
    return Work(TraceRequest(0.0, 100, num_output, adapter=adapter, adapter_rank=rank), 0)


def test_all_who_want_one_adapter_wait_for_one_load() -> None:
    slots: SimAdapters[Work] = SimAdapters(2, 2, LOAD_S)
    first, second = work("a"), work("a")
    assert not slots.ready(first, 1.0) and not slots.ready(second, 1.1)
    assert slots.next_at == 1.0 + LOAD_S and slots.num_loads == 1
    assert slots.advance(slots.next_at) == [first, second]
    assert slots.ready(work("a"), 2.0) and slots.next_at == inf


def test_an_adapter_in_use_is_not_evicted_and_the_next_load_waits_for_its_end() -> None:
    slots: SimAdapters[Work] = SimAdapters(1, 2, LOAD_S)
    user = work("a")
    slots.ready(user, 0.0)
    slots.advance(slots.next_at)
    assert not slots.ready(work("b"), 1.0)
    assert slots.next_at == inf, "no slot to load into"
    slots.release(user, 3.0)
    assert slots.next_at == 3.0 + LOAD_S and slots.slots.resident == ()


def test_loads_at_once_are_bounded_and_larger_ranks_take_longer() -> None:
    slots: SimAdapters[Work] = SimAdapters(4, 1, LOAD_S)
    slots.ready(work("a", rank=32), 0.0)
    slots.ready(work("b"), 0.0)
    assert slots.next_at == 4 * LOAD_S
    slots.advance(slots.next_at)
    assert slots.next_at == 5 * LOAD_S
    assert slots.load_s == LOAD_S, "learnt, for rank 8"
    assert dict(slots.under_way(4 * LOAD_S)) == {"b": LOAD_S}


def test_requests_come_before_prefetches() -> None:
    slots: SimAdapters[Work] = SimAdapters(4, 1, LOAD_S)
    slots.prefetch("a", 8, 0.0)
    slots.prefetch("early", 8, 0.0)
    waiting = work("wanted")
    assert not slots.ready(waiting, 0.1)
    slots.advance(LOAD_S)
    assert slots.advance(slots.next_at) == [waiting]
    slots.advance(slots.next_at)
    assert slots.slots.resident == ("a", "wanted", "early")


def test_a_prefetched_adapter_is_there_when_its_request_comes() -> None:
    replica = SimReplica(ReplicaSpec(max_adapters=2), 64)
    replica.prefetch("a", 8, 0.0)
    assert replica.advance().at == replica.spec.calibration.adapter_load_s
    replica.submit(work("a"), 1.0)
    assert replica.advance().first


def test_a_request_that_waits_for_its_adapter_does_not_hold_up_the_others() -> None:
    replica = SimReplica(ReplicaSpec(max_adapters=1, max_num_batched_tokens=512), 64)
    slow, plain = work("a", rank=64), work(None)
    replica.submit(slow, 0.0)
    replica.submit(plain, 0.01)
    order = []
    while replica.next_at < inf:
        order += replica.advance().ended
    assert order == [plain, slow]
    stats = replica.frame(0.02).stats(0.02)
    assert stats.num_waiting_adapter == 1 and stats.loading[0][0] == "a"
