"""The simulator against formulas and bounds."""

from __future__ import annotations

import pytest

from ops.simulate.bounds import infinite_cache_hit, lru_misses, pooled_lru_hit
from ops.simulate.calibration import Calibration
from ops.simulate.capacity import capacity
from ops.simulate.driver import run
from ops.simulate.fleet import FleetSpec
from ops.simulate.replica import ReplicaSpec
from ops.simulate.slo import Slo
from ops.simulate.trace import TraceRequest
from tests.ops.simulate.making import conversations, poisson, unique_prompts

STEP_TOKENS = 512


@pytest.mark.parametrize("utilisation", [0.5, 0.8])
def test_waiting_is_that_of_an_m_d_1_queue(utilisation: float) -> None:
    """Poisson arrivals, prompts of just one step, one-token answers, one replica: service is deterministic.

    Mean wait = ρ D / (2 (1 - ρ)) (Pollaczek-Khinchine). 20,000 arrivals leave a few per cent of noise.
    """
    spec = ReplicaSpec(max_num_batched_tokens=STEP_TOKENS)
    service_s = spec.calibration.step_s(1, STEP_TOKENS)
    trace = unique_prompts(poisson(20_000, utilisation / service_s), STEP_TOKENS)
    fleet = FleetSpec(1, spec)
    as_recorded = trace.num_prompt_tokens / (fleet.tokens_per_s * trace.duration_s)
    result = run(trace, "round_robin", fleet, as_recorded)
    mean_wait_s = result.summary["ttft_mean_s"] - service_s
    assert mean_wait_s == pytest.approx(utilisation * service_s / (2 * (1 - utilisation)), rel=0.06)
    assert result.summary["busy"] == pytest.approx(utilisation, rel=0.03)


def test_several_replicas_in_turn_are_that_many_queues_with_smoother_arrivals() -> None:
    """Every third arrival of a Poisson process is Erlang-3: less waiting than Poisson, at the same utilisation."""
    spec = ReplicaSpec(max_num_batched_tokens=STEP_TOKENS)
    service_s = spec.calibration.step_s(1, STEP_TOKENS)
    trace = unique_prompts(poisson(9_000, 3 * 0.8 / service_s), STEP_TOKENS)
    fleet = FleetSpec(3, spec)
    result = run(trace, "round_robin", fleet, trace.num_prompt_tokens / (fleet.tokens_per_s * trace.duration_s))
    poisson_wait_s = 0.8 * service_s / (2 * 0.2)
    assert 0.2 * poisson_wait_s < result.summary["ttft_mean_s"] - service_s < 0.6 * poisson_wait_s


def test_a_lone_request_takes_just_its_steps() -> None:
    costs = Calibration()
    trace = unique_prompts([0.0, 1000.0], 1000, num_output=11)
    fleet = FleetSpec(1, ReplicaSpec(max_num_batched_tokens=400))
    result = run(trace, "round_robin", fleet, trace.num_prompt_tokens / (fleet.tokens_per_s * 1000))
    ttft_s = 2 * costs.step_s(1, 400) + costs.step_s(1, 200)
    assert result.ttfts_s[0] == pytest.approx(ttft_s)
    assert result.ends_s[0] == pytest.approx(ttft_s + 10 * costs.step_s(1, 0))
    assert result.summary["tpot_mean_s"] == pytest.approx(costs.step_s(1, 0))


def test_hits_are_at_most_those_of_one_pooled_cache_and_that_at_most_those_of_an_infinite_one() -> None:
    trace = conversations(400, 20.0)
    infinite = infinite_cache_hit(trace.requests, trace.block_tokens)
    before = 0.0
    for kv_tokens in (2_000, 8_000, 32_000, 1_000_000):
        pooled = pooled_lru_hit(trace.requests, trace.block_tokens, kv_tokens)
        assert before <= pooled <= infinite
        before = pooled
    assert before == infinite
    one = run(trace, "round_robin", FleetSpec(1, ReplicaSpec(kv_tokens=1_000_000)), load=0.05)
    assert one.summary["hit_ratio"] == pytest.approx(infinite, abs=0.002), "one ample replica, no hurry"
    scarce = run(trace, "round_robin", FleetSpec(1, ReplicaSpec(kv_tokens=8_000)), load=0.05)
    assert scarce.summary["hit_ratio"] <= pooled_lru_hit(trace.requests, trace.block_tokens, 8_000) + 0.002


def test_lru_misses_are_counted_by_hand() -> None:
    assert lru_misses("abcabc", 3) == 0.5
    assert lru_misses("abcabc", 2) == 1.0
    assert lru_misses("aabbaa", 2) == 2 / 6
    assert lru_misses("", 2) == 0.0


def test_the_target_grows_with_the_prompt_but_not_below_the_floor() -> None:
    slo, costs = Slo(), Calibration()
    assert slo.target_s(TraceRequest(0, 100, 1), costs) == 1.0
    assert slo.target_s(TraceRequest(0, 16_000, 1), costs) == 4.0


def test_capacity_is_where_attainment_crosses_the_line() -> None:
    """Equal prompts, equally spaced: nobody waits below the load at which a replica is busy all the time, everyone
    above it."""
    spec = ReplicaSpec(max_num_batched_tokens=1600)
    trace = unique_prompts([float(i) for i in range(2000)], 1600)
    found = capacity(trace, "round_robin", FleetSpec(2, spec, slo=Slo(floor_s=0.3, factor=1.1)))
    busy_at = (1600 / spec.calibration.prefill_tokens_per_s) / spec.calibration.step_s(1, 1600)
    assert found.load == pytest.approx(busy_at, rel=0.02)
    assert found.result.sustained and found.result.load == found.load
    assert all((attainment >= 0.95) == (load <= found.load) for load, attainment in found.curve)


def test_capacity_is_zero_where_no_load_is_sustained() -> None:
    trace = unique_prompts([float(i) for i in range(50)], 1600)
    found = capacity(trace, "round_robin", FleetSpec(2, slo=Slo(floor_s=0.001, factor=0.5)))
    assert found.load == 0.0 and not found.result.sustained
