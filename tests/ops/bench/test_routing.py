"""`bench routing`: what its sides are, what is compared with what, and a short run of each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ops.bench.harness import Goal, Sample, Samples
from ops.bench.rivals.venvs import RivalVenv
from ops.bench.routing import CHOICES, PAIRS, SIDES, luck, ratios
from ops.bench.routing_sides import ALWAYS_FREE, Workload
from ops.bench.trace_slice import SliceSpec
from routing.policies import POLICIES

ROOT = Path(__file__).parents[3]
METRICS = {"TTFT mean s": 1.0, "TTFT p90 s": 2.0, "in time %": 90.0, "prompt tokens cached %": 40.0}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve requests of three conversations in Mooncake's format, of which two are long."""
    path = tmp_path_factory.mktemp("trace") / "mooncake.jsonl"
    rows = [
        {
            "timestamp": 400 * i,
            "input_length": 512 * (2 + i // 3) - 100,
            "output_length": 40,
            "hash_ids": [1000 * (i % 3) + block for block in range(2 + i // 3)],
        }
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_rival_has_a_policy_of_ours_that_restates_it_in_the_same_place() -> None:
    for rival, ours in PAIRS.items():
        assert rival.partition(":")[2] == ours.partition(":")[2] in POLICIES
        assert rival.startswith("ray") == ours.startswith("warmgate-in-ray")
        assert {rival, ours} <= set(SIDES)


def test_a_policy_by_name_sends_everything_at_once_first_come_first_served(trace: Path) -> None:
    workload = Workload.read(trace, SliceSpec(num_requests=12))
    plain, named = workload.profile(None), workload.profile("cache_aware")
    assert named.routing.policy == "cache_aware"
    assert (named.admission.max_ahead_per_replica, named.admission.look_ahead) == (ALWAYS_FREE, 0)
    assert named.groups[0].engine.order == "fcfs"
    assert plain.admission.max_ahead_per_replica < 100
    assert plain.groups[0].engine.sim == named.groups[0].engine.sim
    assert plain.models[0].route_block_tokens == 64


def test_a_rule_and_its_rival_must_agree_within_a_tenth() -> None:
    ours = METRICS | {"TTFT mean s": 1.15}
    rival = METRICS | {CHOICES: 0.93}
    found = list(ratios(Samples({"warmgate:cache_aware": [ours], "vllm-router:cache_aware": [rival]})))
    assert {r.metric: r.reached for r in found} == {
        CHOICES: True,
        "TTFT mean s": False,
        "in time %": True,
        "prompt tokens cached %": True,
    }
    assert not Goal.within(0.1).met_by(0.89) and Goal.within(0.1).met_by(0.91)
    assert list(ratios(Samples({"warmgate:cache_aware": [ours], "warmgate:round_robin": [METRICS]}))) == []


def test_a_disagreement_is_told_beside_the_rival_s_with_itself() -> None:
    rivals: list[Sample] = [METRICS | {CHOICES: 1.0, "TTFT mean s": mean} for mean in (1.0, 1.3, 0.9)]
    ours: list[Sample] = [METRICS | {"TTFT mean s": mean} for mean in (1.2, 1.5, 1.08)]
    found = list(ratios(Samples({"warmgate-in-ray:power_of_two": ours, "ray:power_of_two": rivals})))
    (itself,) = [r for r in found if (r.against, r.metric) == ("itself", "TTFT mean s")]
    assert (itself.side, round(itself.spread.low, 2), round(itself.spread.high, 2)) == ("ray:power_of_two", 0.69, 1.3)
    (words,) = luck(found)
    assert words.startswith("ray:power_of_two, TTFT mean s: 1.2 times")
    steady: list[Sample] = [METRICS | {CHOICES: 1.0} for _ in ours]
    assert list(luck(list(ratios(Samples({"warmgate-in-ray:power_of_two": ours, "ray:power_of_two": steady}))))) == []


def test_a_figure_that_is_nothing_is_not_divided_by() -> None:
    nothing = METRICS | {"prompt tokens cached %": 0.0, CHOICES: 1.0}
    found = ratios(Samples({"warmgate:round_robin": [METRICS], "vllm-router:round_robin": [nothing]}))
    assert {r.metric for r in found} == {CHOICES, "TTFT mean s", "in time %"}


def run(trace: Path, *sides: str) -> dict[str, Any]:
    words = ["--trace", str(trace), "--replicas", "2", "--load", "0.5"]
    words += [word for side in sides for word in ("--side", side)]
    command = [sys.executable, "-m", "ops.cli", "bench", "routing", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for figures in found["sides"].values():
        assert figures["failed"]["median"] == 0
        assert figures["TTFT p50 s"]["median"] > 0
        assert 20 < figures["prompt tokens cached %"]["median"] < 80
    return found


def test_our_gateway_replays_a_slice(trace: Path) -> None:
    found = run(trace, "warmgate", "warmgate:prefix_affinity")
    assert set(found["sides"]) == {"warmgate", "warmgate:prefix_affinity"}
    assert found["facts"]["num_replicas"] == 2


@pytest.mark.skipif(not RivalVenv.named("vllm-router").installed, reason="vllm-router is not installed")
def test_vllm_router_replays_the_same_slice(trace: Path) -> None:
    found = run(trace, "warmgate:cache_aware", "vllm-router:cache_aware")
    assert {ratio["metric"] for ratio in found["ratios"]} >= {"TTFT mean s", "prompt tokens cached %"}


@pytest.mark.ray
@pytest.mark.slow
def test_ray_serve_replays_the_same_slice(trace: Path) -> None:
    pytest.importorskip("pyarrow", reason="Ray's PrefixCacheAffinityRouter imports it")
    found = run(trace, "ray:prefix_affinity", "warmgate-in-ray:prefix_affinity")
    assert set(found["sides"]) == {"ray:prefix_affinity", "warmgate-in-ray:prefix_affinity"}
    assert found["sides"]["ray:prefix_affinity"][CHOICES]["median"] > 0.6
    assert {ratio["metric"] for ratio in found["ratios"]} >= {"TTFT mean s", CHOICES}
