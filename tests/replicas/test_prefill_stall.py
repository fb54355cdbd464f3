"""Running answers while long prompts arrive: how long one token waits for the next."""

from __future__ import annotations

from statistics import quantiles
from typing import Any

import pytest

from replicas.engine.scheduler import MIN_PREFILL_TOKENS
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
    assert num_steps <= PROMPT_TOKENS / MIN_PREFILL_TOKENS + 1
