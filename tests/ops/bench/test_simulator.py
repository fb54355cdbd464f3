"""`bench simulator`: the simulated fleet is the live one, and both tell the same."""

from __future__ import annotations

import json
from random import Random

import msgspec
import pytest

from ops.bench.harness import Plan, Sample, Samples
from ops.bench.routing_sides import Workload
from ops.bench.simulator import AGREE_ON, PLAYED, SHIPPED, fleet_of, ratios, run
from ops.bench.trace_slice import BLOCK_SIZE, SliceSpec
from ops.simulate.calibration import Calibration
from ops.simulate.driver import run as simulate

SPEC = SliceSpec(num_requests=80, num_replicas=2, load=0.5, scale=8)
ATTEMPTS = 3


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    """Conversations in Mooncake's format: every turn is the one before it and two blocks more."""
    path = tmp_path_factory.mktemp("trace") / "mooncake.jsonl"
    random = Random(3)
    turns: dict[int, int] = {}
    rows = []
    for i in range(80):
        name = random.randrange(20)
        turns[name] = num_blocks = turns.get(name, random.randrange(2, 12)) + 2
        rows.append(
            {
                "timestamp": 700 * i,
                "input_length": 512 * num_blocks - random.randrange(100, 400),
                "output_length": 60,
                "hash_ids": [1000 * name + block for block in range(num_blocks)],
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Workload.read(path, SPEC)


def test_the_simulated_fleet_is_what_the_profile_says(workload: Workload) -> None:
    calibration = Calibration(prefill_tokens_per_s=7000.0)
    shipped, plain = (fleet_of(workload.profile(policy), calibration) for policy in (None, "least_outstanding"))
    engine = workload.profile(None).groups[0].engine
    assert shipped.num_replicas == SPEC.num_replicas
    assert shipped.replica.kv_tokens == SPEC.kv_tokens // SPEC.scale // BLOCK_SIZE * BLOCK_SIZE
    assert shipped.replica.max_num_batched_tokens == engine.max_num_batched_tokens == 2048 // SPEC.scale
    assert (shipped.replica.order, plain.replica.order) == (engine.order, "fcfs")
    assert shipped.replica.calibration is calibration
    assert shipped.binds_late and not plain.binds_late


def test_the_simulator_plays_the_very_requests_at_their_times(workload: Workload) -> None:
    trace, requests = workload.scaled, workload.requests
    fleet = fleet_of(workload.profile(None), Calibration())
    found = simulate(trace, SHIPPED, fleet, trace.num_prompt_tokens / (fleet.tokens_per_s * trace.duration_s))
    assert found.arrivals_s == pytest.approx([r.at_s for r in requests])
    assert [r.num_prompt for r in trace.requests] == [len(r.prompt) for r in requests]
    assert [r.num_output for r in trace.requests] == [r.max_tokens for r in requests]


def test_every_figure_of_every_policy_is_compared() -> None:
    figures: Sample = dict.fromkeys(AGREE_ON, 1.0)
    sides = {f"{kind}: {policy}": [figures] for policy in PLAYED for kind in ("live", "simulated")}
    found = list(ratios(Samples(sides), PLAYED))
    assert len(found) == len(AGREE_ON) * len(PLAYED) and all(ratio.reached for ratio in found)


@pytest.mark.slow
async def test_live_and_simulated_tell_the_same(workload: Workload) -> None:
    """The best of a few visits: a machine that does something else is slower than it was when it was calibrated."""
    seen = []
    for _ in range(ATTEMPTS):
        report = await run(workload, (SHIPPED,), Plan(1, 0), lambda words: None)
        seen.append({ratio.metric: ratio.spread.median for ratio in report.ratios})
        assert abs(seen[-1]["prompt tokens cached %"] - 1) < 0.1
        if all(abs(value - 1) < 0.15 for value in seen[-1].values()):
            msgspec.json.decode(report.json_line())
            return
    pytest.fail(f"simulated over live: {seen}")
