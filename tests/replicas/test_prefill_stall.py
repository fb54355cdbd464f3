"""Running answers while long prompts arrive: how long one token waits for the next."""

from __future__ import annotations

from collections.abc import Callable
from statistics import quantiles
from typing import Any

import pytest

from replicas.engine.sequence import Plan, PlanItem, Sequence
from replicas.engine.stall_limit import MIN_TOKENS, PLAIN_EVERY, StallLimit
from tests.replicas.engine_kit import Kit, make_kit, make_request

PACE: dict[str, Any] = {
    "step_base_s": 0.02, "step_per_sequence_s": 0.001, "prefill_tokens_per_s": 8000.0, "block_size": 16,
    "num_blocks": 4096, "max_model_len": 8600, "max_num_batched_tokens": 512,
}  # fmt: skip
PROMPT_TOKENS = 8192
NUM_TALKERS = 8
DECODE_S = 0.02 + NUM_TALKERS * 0.001


def gaps(kit: Kit, num_prompts: int) -> list[float]:
    """Seconds between the tokens of talkers, while a prompt of 8k tokens follows on another."""
    for i in range(NUM_TALKERS):
        kit.add(make_request(f"talker{i}", range(10 * i, 10 * i + 8), max_tokens=8000))
    times: list[float] = []
    last: dict[str, float] = {}
    num_sent = 0
    while num_sent < num_prompts or not kit.ended(f"reader{num_prompts - 1}"):
        if num_sent < num_prompts and (num_sent == 0 or kit.ended(f"reader{num_sent - 1}")):
            tokens = [(num_sent * 31 + i * 7) % 250 for i in range(PROMPT_TOKENS)]
            kit.add(make_request(f"reader{num_sent}", tokens, max_tokens=2))
            num_sent += 1
        for delta in kit.core.step():
            kit.deltas[delta.request_id].append(delta)
            if delta.request_id.startswith("talker"):
                if delta.request_id in last:
                    times.append(kit.clock.now - last[delta.request_id])
                last[delta.request_id] = kit.clock.now
    return times


def percentile(values: list[float], percent: int) -> float:
    return quantiles(values, n=100)[percent - 1]


def unchecked(**changes: Any) -> Kit:
    kit = make_kit(**{**PACE, **changes})
    kit.core.runner = kit.runner.inner
    return kit


def test_no_token_waits_longer_than_one_chunk_takes() -> None:
    chunk_s = 512 / 8000.0
    assert max(gaps(unchecked(), 3)) <= DECODE_S + 0.001 + chunk_s + 1e-9


@pytest.mark.parametrize("order", ["shortest", "fcfs", "priority", "deadline", "fair"])
def test_with_a_limit_tokens_come_at_half_the_pace_at_worst_while_prompts_of_8k_tokens_arrive(order: str) -> None:
    kit = unchecked(max_prefill_stall_s=0.02, order=order)
    waits = gaps(kit, 3)
    assert percentile(waits, 99) <= 2.0 * min(percentile(waits, 50), DECODE_S)
    assert kit.core.stats().num_preemptions == 0


def test_alone_a_prompt_is_computed_at_full_speed() -> None:
    times = []
    for changes in ({}, {"max_prefill_stall_s": 0.02}):
        kit = unchecked(**changes)
        kit.add(make_request("reader", [i * 7 % 250 for i in range(PROMPT_TOKENS)], max_tokens=1))
        started = kit.clock.now
        kit.run()
        times.append(kit.clock.now - started)
    assert times[0] == times[1]


def test_the_limit_never_starves_a_prompt() -> None:
    kit = unchecked(max_prefill_stall_s=1e-6)
    kit.add(make_request("talker", range(8), max_tokens=3000))
    kit.step()
    kit.add(make_request("reader", range(40), max_tokens=1))
    while not kit.ended("reader"):
        kit.step()
    assert not kit.ended("talker")


def test_a_prompt_is_not_cut_into_crumbs_where_a_chunk_takes_longer_than_the_limit_by_itself() -> None:
    """The pace learnt from small chunks is low, which must not make them smaller still."""
    kit = unchecked(max_prefill_stall_s=0.02, step_per_sequence_s=0.03)
    kit.add(make_request("talker", range(8), max_tokens=8000))
    kit.step()
    kit.add(make_request("reader", [i * 7 % 250 for i in range(PROMPT_TOKENS)], max_tokens=1))
    num_steps = 0
    while not kit.ended("reader"):
        for delta in kit.core.step():
            kit.deltas[delta.request_id].append(delta)
        num_steps += 1
    assert num_steps <= PROMPT_TOKENS / MIN_TOKENS * (1 + 1 / PLAIN_EVERY) + 2


@pytest.mark.parametrize("num_talkers", [1, 8, 60])
def test_a_prompt_that_comes_together_with_the_answers_is_not_taken_for_slow(num_talkers: int) -> None:
    """No step was seen without it, so what the answers take by themselves is not known yet."""
    kit = unchecked(max_prefill_stall_s=0.02, max_num_seqs=64)
    for i in range(num_talkers):
        kit.add(make_request(f"talker{i}", range(10 * i, 10 * i + 8), max_tokens=8000))
    kit.add(make_request("reader", [i * 7 % 250 for i in range(PROMPT_TOKENS)], max_tokens=1))
    num_steps = 0
    while not kit.ended("reader"):
        for delta in kit.core.step():
            kit.deltas[delta.request_id].append(delta)
        num_steps += 1
        assert num_steps < 90, "8,192 tokens in chunks of up to 160"


LIMIT_S = 0.03


def mixed_plan(num_tokens: int, num_decodes: int = 1) -> Plan:
    """Answers' next tokens beside so many of a prompt; none of a prompt if that is 0."""
    talkers = [Sequence.from_request(make_request(f"talker{i}", range(600)), 0.0) for i in range(num_decodes)]
    reader = Sequence.from_request(make_request("reader", range(600)), 0.0)
    items = tuple(PlanItem(seq, 599, 1, True) for seq in talkers)
    return Plan((*items, PlanItem(reader, 0, num_tokens, False)) if num_tokens else items)


class Steps:
    """Steps under a limit, one answer in each, on a clock that obeys `cost_s(tokens)`."""

    def __init__(self, rate: float = 500.0) -> None:
        self.limit = StallLimit(LIMIT_S, 512)
        self.rate = rate
        self.num_plain = 0

    def allowed(self) -> int:
        """Like a scheduler: a step without prompts where none is allowed."""
        while (tokens := self.limit.tokens(1, lambda seconds: seconds * self.rate)) == 0:
            self.limit.observe(mixed_plan(0), DECODE_S)
            self.num_plain += 1
        return tokens

    def take(self, cost_s: Callable[[int], float], at_most: int = 8192) -> tuple[int, float]:
        num_tokens = min(self.allowed(), at_most)
        self.limit.observe(mixed_plan(num_tokens), DECODE_S + cost_s(num_tokens))
        return num_tokens, cost_s(num_tokens)


def depth_cost_s(num_tokens: int, depth: int) -> float:
    """Like a 135M model's on one core: each token reads all that lie before it."""
    return 0.004 + num_tokens * (0.002 + 0.005 * depth / 8000)


@pytest.mark.parametrize("rate", [50.0, 500.0, 8000.0])
def test_a_stall_keeps_to_its_limit_at_any_depth_whatever_the_first_guess(rate: float) -> None:
    steps, depth, stalls = Steps(rate), 0, []
    while depth < 8000:
        num_tokens, took_s = steps.take(lambda n: depth_cost_s(n, depth), 8000 - depth)  # noqa: B023
        stalls.append(took_s)
        depth += num_tokens
    assert max(stalls[2:]) <= 1.25 * LIMIT_S, "but for the first guess"
    assert percentile(stalls, 50) >= 0.7 * LIMIT_S, "the time allowed is used"
    assert steps.num_plain <= len(stalls) / PLAIN_EVERY + 1


def test_one_slow_step_costs_prompts_little() -> None:
    steps = Steps()
    for _ in range(20):
        steps.take(lambda n: depth_cost_s(n, 0))
    before = steps.allowed()
    steps.take(lambda n: 2.0)
    assert before // 2 <= steps.allowed() < before
    for _ in range(4):
        steps.take(lambda n: depth_cost_s(n, 0))
    assert steps.allowed() >= 0.9 * before


def test_short_prompts_say_nothing_about_longer_ones_unless_they_take_too_long() -> None:
    steps = Steps(rate=2000.0)
    assert steps.allowed() == 60
    for _ in range(50):
        steps.take(lambda n: 0.0025, at_most=5)
    assert steps.allowed() == 60
    steps.take(lambda n: LIMIT_S)
    steps.take(lambda n: 0.3, at_most=5)
    assert steps.allowed() < 15, "five were too many: sixty are"


def test_steps_that_had_no_limit_are_no_evidence() -> None:
    """A whole chunk beside a prompt that was cached but for its last token: no answer waits for it."""
    steps = Steps()
    for _ in range(10):
        steps.take(lambda n: depth_cost_s(n, 0))
    before = steps.allowed()
    steps.limit.observe(mixed_plan(0), DECODE_S)  # what was allowed is used up
    for _ in range(12):
        steps.limit.observe(mixed_plan(512), 1.0)
    assert steps.allowed() == before


def test_what_answers_take_is_told_by_their_number() -> None:
    limit = StallLimit(LIMIT_S, 512)
    for num_decodes, decode_s in ((60, 0.32), (1, 0.02)):
        assert limit.tokens(num_decodes, lambda s: 60.0) == 0
        limit.observe(mixed_plan(0, num_decodes), decode_s)
    for _ in range(30):
        num_tokens = limit.tokens(1, lambda s: 60.0)
        limit.observe(mixed_plan(num_tokens), 0.02 + num_tokens * 0.002)
    assert 10 <= limit.tokens(1, lambda s: 60.0) <= 16


def test_a_clock_that_stands_still_teaches_nothing() -> None:
    steps = Steps()
    before = steps.allowed()
    steps.limit.observe(mixed_plan(before), 0.0)
    assert steps.allowed() == before


def test_without_a_limit_a_step_takes_all_it_can() -> None:
    limit = StallLimit(None, 512)
    assert limit.tokens(1, lambda s: 0.0) == 512
    limit.observe(mixed_plan(512), 9.0)
    assert limit.tokens(1, lambda s: 0.0) == 512
