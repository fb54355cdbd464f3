"""The scheduler around a hash model: what it plans, and that no plan changes what is said."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from replicas.contract import GenerateRequest, RefusedError, pack_tokens
from replicas.engine.order import FAIR_WINDOW_S, MAX_HANDICAP_S, ORDERS, Pace, deadline, fcfs, order_key, priority
from replicas.engine.speculative.control import Fixed
from replicas.engine.speculative.speculator import Speculator
from replicas.engine.usage import KvUse, kv_use
from tests.replicas.engine_kit import EOS, LETTERS, Kit, adapter, make_kit, make_request
from tests.replicas.wild_drafter import WildDrafter


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first + i) % 250 for i in range(length)]


def run_alone(request: GenerateRequest) -> list[int]:
    """What the same request gives in an engine of its own, unbatched and uncached."""
    kit = make_kit(num_blocks=512, max_num_batched_tokens=2048, prefix_caching=False)
    kit.add(request)
    kit.run()
    return kit.tokens(request.request_id)


def test_a_request_ends_once_with_exactly_the_tokens_of_the_naive_computation() -> None:
    kit = make_kit()
    request = make_request("a", prompt(13), max_tokens=9)
    kit.add(request)
    kit.run()
    assert kit.tokens("a") == kit.expected(request)
    assert [delta.finish_reason for delta in kit.deltas["a"]] == [None] * 8 + ["length"]
    assert kit.core.scheduler.pool.num_used == 0


def test_a_long_prompt_is_computed_in_chunks_of_the_token_budget() -> None:
    kit = make_kit(max_num_batched_tokens=16)
    request = make_request("a", prompt(50), max_tokens=1)
    kit.add(request)
    kit.run()
    assert [(plan.items[0].start, plan.num_tokens) for plan in kit.runner.plans] == [
        (0, 16),
        (16, 16),
        (32, 16),
        (48, 2),
    ]
    assert kit.tokens("a") == kit.expected(request)


def test_decodes_never_stall_behind_a_long_prompt() -> None:
    kit = make_kit(max_num_batched_tokens=16, num_blocks=128)
    kit.add(make_request("talker", prompt(5), max_tokens=30))
    kit.step()
    kit.add(make_request("reader", prompt(200, 100), max_tokens=1))
    while not kit.ended("reader"):
        kit.step()
        assert len(kit.deltas["talker"]) == len(kit.runner.plans)
    assert all(plan.num_tokens == 16 for plan in kit.runner.plans[1:-1]), "the rest of the budget goes to the prompt"


def test_requests_join_and_leave_the_running_batch() -> None:
    kit = make_kit()
    requests = [make_request(f"r{i}", prompt(3 + i, 40 * i), max_tokens=3 + 2 * i) for i in range(5)]
    for request in requests:
        kit.add(request)
        kit.step()
    kit.run()
    for request in requests:
        assert kit.tokens(request.request_id) == kit.expected(request)


def test_a_second_request_takes_the_first_ones_prefix_from_the_cache() -> None:
    kit = make_kit()
    kit.add(make_request("a", prompt(17)))
    kit.run()
    request = make_request("b", [*prompt(14), 1, 2, 3, 4])
    kit.add(request)
    kit.run()
    assert kit.deltas["b"][0].num_cached_tokens == 12
    assert all(delta.num_cached_tokens is None for delta in kit.deltas["b"][1:])
    assert kit.tokens("b") == kit.expected(request)


def test_a_prompt_found_whole_in_the_cache_computes_its_last_token_into_a_copy() -> None:
    kit = make_kit()
    kit.add(make_request("a", prompt(16), max_tokens=1))
    kit.run()
    requests = [make_request(name, prompt(16), max_tokens=6) for name in "bc"]
    for request in requests:
        kit.add(request)
    kit.step()
    plan = kit.runner.plans[-1]
    assert [(item.start, item.num_tokens) for item in plan.items] == [(15, 1), (15, 1)]
    assert len({source for source, _ in plan.copies}) == 1 and len({target for _, target in plan.copies}) == 2
    kit.run()
    for request in requests:
        assert kit.deltas[request.request_id][0].num_cached_tokens == 15
        assert kit.tokens(request.request_id) == kit.expected(request)


def test_the_cache_never_crosses_adapters_or_salts() -> None:
    kit = make_kit(max_adapters=3, num_blocks=64)
    for name in ("x@1", "x@2", "y@1"):
        kit.core.load_adapter(adapter(name))
    kit.add(make_request("a", prompt(16), salt=b"tenant-1"))
    kit.run()
    others: list[dict[str, Any]] = [
        {"salt": b"tenant-2"}, {}, {"adapter": "x@1"}, {"adapter": "x@2"}, {"adapter": "y@1"},
        {"adapter": "x@1", "salt": b"tenant-1"},
    ]  # fmt: skip
    for i, other in enumerate(others):
        kit.add(make_request(f"b{i}", prompt(16), **other))
        kit.run()
        assert kit.deltas[f"b{i}"][0].num_cached_tokens == 0, other
        assert kit.tokens(f"b{i}") == kit.expected(make_request(f"b{i}", prompt(16), **other))
    for name, same in (("c", {"salt": b"tenant-1"}), ("d", {"adapter": "x@2"})):
        kit.add(make_request(name, prompt(16), **same))
        kit.run()
        assert kit.deltas[name][0].num_cached_tokens == 15


def test_blocks_are_not_offered_to_the_cache_before_they_are_computed() -> None:
    kit = make_kit(max_num_batched_tokens=8)
    kit.add(make_request("a", prompt(32), max_tokens=1))
    kit.step()
    kit.add(make_request("b", prompt(32), max_tokens=1))
    assert kit.core.scheduler.pool.num_cached == 2
    kit.run()
    assert kit.tokens("a") == kit.tokens("b") == kit.expected(make_request("b", prompt(32), max_tokens=1))


def test_without_prefix_caching_nothing_is_cached() -> None:
    kit = make_kit(prefix_caching=False)
    for name in "ab":
        kit.add(make_request(name, prompt(16)))
        kit.run()
    assert kit.deltas["b"][0].num_cached_tokens == 0
    assert kit.core.scheduler.pool.num_cached == 0 and kit.core.kv_events() == []


@pytest.mark.parametrize("caching", [True, False])
def test_preempted_request_resumes_with_identical_tokens(caching: bool) -> None:
    kit = make_kit(num_blocks=12, prefix_caching=caching)
    requests = [
        make_request(f"r{i}", prompt(6, 30 * i), max_tokens=30, temperature=0.8, seed=i, logprobs=1) for i in range(4)
    ]
    for request in requests:
        kit.add(request)
    kit.run()
    assert kit.core.stats().num_preemptions > 0
    for request in requests:
        assert kit.tokens(request.request_id) == kit.expected(request) == run_alone(request)


def test_the_last_in_the_order_is_preempted_and_the_first_never() -> None:
    kit = make_kit(num_blocks=12)
    for i in range(4):
        kit.add(make_request(f"r{i}", prompt(6, 30 * i), max_tokens=30))
    preempted: set[str] = set()
    while kit.core.has_work:
        before = {seq.request_id for seq in kit.core.scheduler.running}
        kit.step()
        after = {seq.request_id for seq in kit.core.scheduler.running}
        gone = {name for name in before - after if not kit.ended(name)}
        preempted |= gone
        assert all(name > kept for name in gone for kept in after & before)
    assert preempted and "r0" not in preempted


def test_a_prompt_that_can_never_fit_is_refused_at_once_with_the_numbers() -> None:
    for kit, limit in ((make_kit(max_model_len=40), 40), (make_kit(num_blocks=10), 40)):
        with pytest.raises(RefusedError, match=rf"{limit} tokens, but the prompt has {limit} tokens") as refused:
            kit.add(make_request("a", prompt(limit)))
        assert refused.value.fault.code == "context_length_exceeded"
        kit.add(make_request("b", prompt(limit - 1)))
        kit.run()
        assert len(kit.tokens("b")) == 1 and kit.last("b").finish_reason == "length"


def test_an_answer_ends_with_length_where_the_context_ends() -> None:
    kit = make_kit(max_model_len=20)
    kit.add(make_request("a", prompt(15), max_tokens=100))
    kit.run()
    assert len(kit.tokens("a")) == 5 and kit.last("a").finish_reason == "length"


def test_a_full_waiting_queue_refuses_with_overloaded() -> None:
    kit = make_kit(max_waiting=2)
    for name in "ab":
        kit.add(make_request(name, prompt(4)))
    with pytest.raises(RefusedError) as refused:
        kit.add(make_request("c", prompt(4)))
    assert refused.value.fault.code == "overloaded" and refused.value.fault.retryable


def test_an_open_request_id_is_refused() -> None:
    kit = make_kit()
    kit.add(make_request("a", prompt(4)))
    with pytest.raises(RefusedError, match="open already"):
        kit.add(make_request("a", prompt(4)))


def test_a_deadline_that_passes_while_waiting_ends_the_request() -> None:
    kit = make_kit(max_num_seqs=1, step_base_s=1.0)
    kit.add(make_request("first", prompt(4), max_tokens=10))
    kit.add(make_request("late", prompt(4), deadline_s=3.0))
    kit.add(make_request("patient", prompt(4), deadline_s=60.0))
    kit.run()
    fault = kit.last("late").fault
    assert kit.last("late").finish_reason == "error" and fault is not None and fault.code == "deadline_exceeded"
    assert len(kit.deltas["late"]) == 1
    assert len(kit.deltas["first"]) == 10 and len(kit.tokens("patient")) == 4


def test_a_deadline_does_not_end_a_request_that_has_begun() -> None:
    kit = make_kit(step_base_s=1.0)
    kit.add(make_request("a", prompt(4), max_tokens=10, deadline_s=2.0))
    kit.run()
    assert len(kit.tokens("a")) == 10


def test_a_preempted_request_has_begun_and_keeps_no_deadline() -> None:
    kit = make_kit(num_blocks=12, step_base_s=1.0)
    for i in range(4):
        kit.add(make_request(f"r{i}", prompt(6, 30 * i), max_tokens=30, deadline_s=5.0))
    kit.run()
    assert kit.core.stats().num_preemptions > 0
    assert all(len(kit.tokens(f"r{i}")) == 30 for i in range(4))


def test_prompts_are_not_admitted_into_blocks_that_others_were_promised() -> None:
    kit = make_kit(num_blocks=32, max_num_batched_tokens=16)
    for i in range(4):
        kit.add(make_request(f"r{i}", prompt(70, 11 * i), max_tokens=3))  # 18 blocks each, five steps to compute
    kit.run()
    assert kit.core.stats().num_preemptions == 0
    assert kit.core.stats().num_output_tokens == 12


def test_aborting_frees_the_blocks_at_once_and_tells_at_the_next_step() -> None:
    kit = make_kit()
    kit.add(make_request("a", prompt(10), max_tokens=50))
    kit.add(make_request("b", prompt(10, 90), max_tokens=50))
    kit.step()
    kit.core.abort("a")
    assert kit.core.scheduler.pool.num_used == 2, "the six tokens of b that the budget left room for"
    kit.step()
    assert kit.last("a").finish_reason == "abort" and kit.last("a").token_ids == ()
    kit.core.abort("a")
    kit.core.abort("b")
    kit.run()
    assert kit.core.scheduler.pool.num_used == 0 and kit.last("b").finish_reason == "abort"


def test_a_request_aborted_between_plan_and_commit_gets_no_token() -> None:
    kit = make_kit()
    scheduler = kit.core.scheduler
    kit.add(make_request("a", prompt(4)))
    kit.add(make_request("b", prompt(4, 9)))
    plan = scheduler.plan()
    result = kit.core.runner.execute(plan)
    kit.core.abort("a")
    deltas = scheduler.commit(plan, result)
    assert [(delta.request_id, len(delta.token_ids)) for delta in deltas] == [("a", 0), ("b", 1)]
    scheduler.check()


def find_eos(kit: Kit, **sampling: object) -> GenerateRequest:
    """A request whose answer ends by itself after a few tokens."""
    for first in range(200):
        request = make_request("a", prompt(5, first), max_tokens=40, **sampling)
        if 2 < len(kit.expected(request)) < 12:
            return request
    raise AssertionError("no such request")


def test_end_of_sequence_is_delivered_and_ends_with_stop() -> None:
    kit = make_kit(mean_output_tokens=6)
    request = find_eos(kit)
    kit.add(request)
    kit.run()
    assert kit.tokens("a") == kit.expected(request) and kit.tokens("a")[-1] == EOS
    assert (kit.last("a").finish_reason, kit.last("a").stop_reason) == ("stop", None)


def test_ignored_end_of_sequence_runs_to_the_limit() -> None:
    kit = make_kit(mean_output_tokens=6)
    kit.add(make_request("a", prompt(5), max_tokens=40, ignore_eos=True))
    kit.run()
    assert len(kit.tokens("a")) == 40 and kit.last("a").finish_reason == "length"


def test_a_stop_token_ends_with_its_id_but_not_before_min_tokens() -> None:
    free = make_kit().expected(make_request("a", prompt(5), max_tokens=30))
    stop = free[3]
    places = [i + 1 for i, token_id in enumerate(free) if token_id == stop]
    for min_tokens, expected in ((0, places[0]), (places[0], places[0]), (places[0] + 1, [*places, 30][1])):
        kit = make_kit()
        kit.add(make_request("a", prompt(5), max_tokens=30, stop_token_ids=(stop,), min_tokens=min_tokens))
        kit.run()
        assert len(kit.tokens("a")) == expected
        if expected < 30:
            assert (kit.last("a").finish_reason, kit.last("a").stop_reason) == ("stop", stop)


def test_a_resumed_request_continues_as_if_nothing_had_happened() -> None:
    whole = make_request("a", prompt(9), max_tokens=20, temperature=0.9, seed=3)
    answer = make_kit().expected(whole)
    for done in (1, 5, 19):
        kit = make_kit()
        resumed = make_request(
            "a", prompt(9), max_tokens=20, temperature=0.9, seed=3, produced=pack_tokens(answer[:done]), attempt=2
        )
        kit.add(resumed)
        kit.run()
        assert kit.tokens("a") == answer[done:] and kit.last("a").attempt == 2
        assert kit.last("a").finish_reason == "length"


def test_a_resumed_request_that_had_come_to_its_end_ends_at_once() -> None:
    kit = make_kit(max_model_len=20)
    kit.add(make_request("max", prompt(5), max_tokens=2, produced=pack_tokens([98, 99])))
    kit.add(make_request("eos", prompt(5), max_tokens=9, produced=pack_tokens([98, EOS])))
    kit.add(make_request("full", prompt(15), max_tokens=9, produced=pack_tokens([97] * 5)))
    kit.run()
    assert [kit.last(name).finish_reason for name in ("max", "eos", "full")] == ["length", "stop", "length"]
    assert kit.runner.plans == []


def test_prompt_logprobs_are_collected_over_chunks_and_never_come_from_the_cache() -> None:
    kit = make_kit(max_num_batched_tokens=8)
    kit.add(make_request("warm", prompt(22)))
    kit.run()
    request = make_request("a", prompt(22), prompt_logprobs=2, logprobs=1)
    kit.add(request)
    kit.run()
    first = kit.deltas["a"][0]
    assert first.num_cached_tokens == 0 and first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None and len(first.prompt_logprobs) == 22
    assert [lp.token_id for lp in first.prompt_logprobs if lp] == prompt(22)[1:]
    assert all(delta.prompt_logprobs is None for delta in kit.deltas["a"][1:])
    assert [delta.logprobs[0].token_id for delta in kit.deltas["a"] if delta.logprobs] == kit.tokens("a")


def test_prompt_logprobs_survive_a_preemption_in_the_middle_of_the_prompt() -> None:
    kit = make_kit(num_blocks=32, max_num_batched_tokens=8)
    for i in range(6):
        kit.add(make_request(f"talker{i}", prompt(4, 20 * i), max_tokens=30))
    for _ in range(4):
        kit.step()
    kit.add(make_request("scored", prompt(32, 60), prompt_logprobs=0, max_tokens=2))
    was_preempted = False
    while not kit.deltas["scored"]:
        computed = {seq.request_id: seq.num_computed for seq in kit.core.scheduler.running}
        kit.step()
        running = {seq.request_id for seq in kit.core.scheduler.running}
        was_preempted = was_preempted or (computed.get("scored", 0) > 4 and "scored" not in running)
    kit.run()
    assert was_preempted
    logprobs = kit.deltas["scored"][0].prompt_logprobs
    assert logprobs is not None and [lp.token_id for lp in logprobs if lp] == prompt(32, 60)[1:]
    assert len(kit.tokens("scored")) == 2


def test_orders_are_arrival_plus_a_bounded_handicap() -> None:
    low = make_request("low", prompt(4), priority=5, deadline_s=900.0)
    high = make_request("high", prompt(4), priority=-5, deadline_s=1.0)
    extreme = make_request("x", prompt(4), priority=10**6, deadline_s=10.0**9)
    pace = Pace(1000.0, 500.0)
    assert fcfs(low, 1.0, 9, pace) < fcfs(high, 2.0, 1, pace)
    assert priority(high, 2.0, 9, pace) < priority(low, 1.0, 1, pace) < priority(high, 102.0, 1, pace)
    assert deadline(high, 2.0, 9, pace) < deadline(low, 1.0, 1, pace) < deadline(high, 1000.0, 1, pace)
    for order in ORDERS.values():
        for num_uncached in (1, 10**9):
            assert abs(order(extreme, 50.0, num_uncached, Pace()) - 50.0) <= MAX_HANDICAP_S
    assert order_key(1.001, 7.0, 0) > order_key(1.002, 3.0, 1), "the fair tag decides within a tick"
    assert order_key(1.001, 7.0, 0) < order_key(1.052, 3.0, 1), "and only there"


@pytest.mark.parametrize(
    ("order", "expected"),
    [("fcfs", ["plain", "low", "high", "soon"]), ("priority", ["high", "plain", "soon", "low"]),
     ("deadline", ["soon", "plain", "low", "high"]), ("shortest", ["high", "plain", "soon", "low"]),
     ("fair", ["low", "soon", "plain", "high"])],
)  # fmt: skip
def test_waiting_requests_run_in_the_order_of_the_policy(order: str, expected: list[str]) -> None:
    kit = make_kit(max_num_seqs=1, order=order)
    arrivals = {
        "plain": {"deadline_s": 300.0, "fair_tag": 8.0},
        "low": {"priority": 3, "fair_tag": 2.0},
        "high": {"priority": -3, "fair_tag": 9.0},
        "soon": {"deadline_s": 9.0, "fair_tag": 5.0},
    }
    for name, changes in arrivals.items():
        kit.add(make_request(name, prompt(4), max_tokens=2, **changes))
        kit.clock.sleep(0.1)
    ended: list[str] = []
    while kit.core.has_work:
        ended += [delta.request_id for delta in kit.step() if delta.finish_reason]
    assert ended == expected


def test_simultaneous_requests_run_by_fair_tag() -> None:
    kit = make_kit(max_num_seqs=1)
    for name, tag in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        kit.add(make_request(name, prompt(4), max_tokens=1, fair_tag=tag))
    ended: list[str] = []
    while kit.core.has_work:
        ended += [delta.request_id for delta in kit.step() if delta.finish_reason]
    assert ended == ["a", "b", "c"]


def test_by_fair_tag_a_tenant_that_floods_delays_itself_alone() -> None:
    """Tags as the gateway's queue gives them: what a tenant was served before, over its weight."""
    kit = make_kit(max_num_seqs=1, order="fair", max_waiting=64, step_base_s=0.01)
    for i in range(30):
        kit.add(make_request(f"flood{i}", prompt(8, i), tenant="f", fair_tag=8.0 * i, max_tokens=1))
    order: list[str] = []
    for i in range(5):
        kit.add(make_request(f"other{i}", prompt(8, 40 + i), tenant="o", fair_tag=4.0 + 8.0 * i, max_tokens=1))
    while kit.core.has_work:
        order += [delta.request_id for delta in kit.step() if delta.finish_reason]
    assert order[:10] == [f"{name}{i}" for i in range(5) for name in ("flood", "other")]


def test_by_fair_tag_a_request_waits_for_none_of_a_later_window() -> None:
    kit = make_kit(max_num_seqs=1, order="fair", step_base_s=0.01)
    kit.add(make_request("busy", prompt(4), max_tokens=3))
    kit.step()
    kit.add(make_request("beyond reason", prompt(4, 9), fair_tag=1e12, max_tokens=1))
    kit.clock.sleep(FAIR_WINDOW_S)
    kit.add(make_request("later", prompt(4, 17), fair_tag=0.0, max_tokens=1))
    order: list[str] = []
    while kit.core.has_work:
        order += [delta.request_id for delta in kit.step() if delta.finish_reason]
    assert order == ["busy", "beyond reason", "later"]


def test_a_low_priority_request_is_not_starved_by_endless_high_ones() -> None:
    kit = make_kit(max_num_seqs=1, order="priority", step_base_s=0.1)
    kit.add(make_request("low", prompt(4), priority=1, max_tokens=2))
    for i in range(2000):
        kit.add(make_request(f"high{i}", prompt(4), priority=0, max_tokens=2))
        kit.step()
        kit.step()
        if kit.ended("low"):
            break
    assert kit.ended("low")
    assert 9.0 < kit.clock.now - 100.0 < 12.0, "one band is worth ten seconds"


def test_a_large_prompt_is_not_starved_by_small_ones() -> None:
    kit = make_kit(num_blocks=32)
    for i in range(6):
        kit.add(make_request(f"s{i}", prompt(8, 17 * i), max_tokens=9))
    kit.step()
    kit.add(make_request("large", prompt(110), max_tokens=2))
    for i in range(6, 200):
        kit.add(make_request(f"s{i}", prompt(8, 17 * i), max_tokens=9))
        kit.step()
        if kit.ended("large"):
            break
    assert kit.ended("large") and i < 60


def test_a_step_never_holds_more_adapters_than_there_are_slots() -> None:
    kit = make_kit(max_adapters=3)
    names = ["x@1", "y@1", "z@1"]
    kit.core.scheduler.config = replace(kit.core.scheduler.config, max_adapters=2)
    for name in names:
        kit.core.load_adapter(adapter(name))
    requests = [make_request(f"r{i}", prompt(5), adapter=names[i % 3], max_tokens=5) for i in range(9)]
    for request in requests:
        kit.add(request)
    kit.run()
    assert max(len({i.seq.request.adapter for i in plan.items}) for plan in kit.runner.plans) == 2
    for request in requests:
        assert kit.tokens(request.request_id) == kit.expected(request)


def test_at_least_95_percent_of_the_allocated_kv_holds_tokens_under_mixed_load() -> None:
    """Lengths as in chat traffic (log-normal, median 300 in and 180 out), blocks of 16, a pool that is always full."""
    rng = random.Random(5)
    kit = make_kit(num_blocks=600, block_size=16, max_num_seqs=32, max_num_batched_tokens=512, max_model_len=4096)
    kit.core.runner = kit.runner.inner  # unchecked: this is about memory, and long
    total = KvUse()
    for i in range(60):
        length = min(2000, int(rng.lognormvariate(5.7, 0.9)))
        shared = prompt(200) if i % 3 == 0 else []
        kit.add(
            make_request(
                f"r{i}",
                [*shared, *(rng.randrange(250) for _ in range(length))],
                max_tokens=min(800, 1 + int(rng.lognormvariate(5.2, 0.7))),
            )
        )
    scheduler = kit.core.scheduler
    while kit.core.has_work:
        kit.core.step()
        total += kv_use(scheduler.running, 16)
    assert total.share >= 0.95, total
    assert scheduler.num_preemptions > 0, "the pool was never full"


class SchedulerMachine(RuleBasedStateMachine):
    """Requests of all kinds come, run, are aborted; every plan is checked, every answer compared with the naive one."""

    order = "shortest"

    def __init__(self) -> None:
        super().__init__()
        self.kit = make_kit(
            num_blocks=14,
            max_num_seqs=4,
            max_num_batched_tokens=10,
            mean_output_tokens=25,
            max_waiting=6,
            order=self.order,
        )
        self.requests: dict[str, GenerateRequest] = {}

    @rule(
        length=st.integers(1, 40),
        family=st.integers(0, 2),
        max_tokens=st.integers(1, 25),
        temperature=st.sampled_from([0.0, 1.0]),
        salt=st.sampled_from([b"", b"s"]),
        done=st.integers(0, 6),
        changes=st.fixed_dictionaries({}, optional={
            "prompt_logprobs": st.integers(0, 3), "min_tokens": st.integers(0, 5), "ignore_eos": st.just(True),
            "stop_token_ids": st.just((LETTERS[3], LETTERS[11])), "fair_tag": st.floats(0, 30),
            "tenant": st.sampled_from("uv"), "priority": st.integers(-1, 1),
        }),
    )  # fmt: skip
    def add(self, length, family, max_tokens, temperature, salt, done, changes) -> None:  # type: ignore[no-untyped-def]
        name = f"r{len(self.requests)}"
        fixed = {"max_tokens": max_tokens, "temperature": temperature, "salt": salt, "seed": family, **changes}
        request = make_request(name, prompt(length, 100 * family), **fixed)
        answer = self.kit.expected(request)[: 56 - length]
        if done < len(answer):
            request = make_request(name, prompt(length, 100 * family), produced=pack_tokens(answer[:done]), **fixed)
        try:
            self.kit.add(request)
        except RefusedError as refused:
            assert refused.fault.code == "overloaded"
            return
        self.requests[name] = request

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            if self.kit.core.has_work:
                self.kit.step()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self.kit.core.abort(name)
        self.kit.core.scheduler.check()
        if self.kit.core.has_work:
            self.kit.step()
        assert self.kit.ended(name)

    @rule()
    def clear_cache(self) -> None:
        self.kit.core.scheduler.pool.clear()
        self.kit.core.scheduler.check()

    def teardown(self) -> None:
        self.kit.run()
        assert self.kit.core.scheduler.pool.num_used == 0
        assert self.kit.core.stats().num_waiting_tokens == 0
        for name, request in self.requests.items():
            assert self.kit.ended(name)
            last, got, expected = self.kit.last(name), self.kit.tokens(name), self.kit.expected(request)
            room = 56 - request.num_prompt_tokens - len(request.produced) // 4
            if last.finish_reason == "abort":
                assert got == expected[: len(got)]
                continue
            assert got == expected[:room]
            num_output, sampling = len(request.produced) // 4 + len(got), request.sampling
            ends = (*sampling.stop_token_ids, *(() if sampling.ignore_eos else (EOS,)))
            stops = len(expected) <= room and got[-1] in ends and num_output >= sampling.min_tokens
            assert last.finish_reason == ("stop" if stops else "length")
            if request.sampling.prompt_logprobs is not None and not request.produced:
                logprobs = self.kit.deltas[name][0].prompt_logprobs
                assert logprobs is not None and len(logprobs) == request.num_prompt_tokens


class FirstComeMachine(SchedulerMachine):
    order = "fcfs"


class SpeculatingMachine(SchedulerMachine):
    """The same answers with guesses of all kinds checked beside everything else."""

    share_right = 0.7

    def __init__(self) -> None:
        super().__init__()
        self.kit.core.speculator = Speculator(WildDrafter(self.kit.model, 3, self.share_right), Fixed(7))


class WrongGuessesMachine(SpeculatingMachine):
    share_right = 0.0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None, derandomize=True)
TestFirstComeMachine = FirstComeMachine.TestCase
TestSpeculatingMachine = SpeculatingMachine.TestCase
TestSpeculatingMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
TestWrongGuessesMachine = WrongGuessesMachine.TestCase
TestWrongGuessesMachine.settings = settings(max_examples=50, stateful_step_count=40, deadline=None, derandomize=True)
TestFirstComeMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
