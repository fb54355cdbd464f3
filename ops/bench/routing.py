"""`warmgate bench routing`: one slice of a trace, live, through our gateway and through others' routers.

Every side has the same sim replicas (real scheduler and block pool), cold at each visit, that take prompts first come,
first served; ours as it ships may order them:

    warmgate              the gateway as it ships: its policy, late binding, prefill order
    warmgate:POLICY       the gateway with a policy by name and every request sent at once, as other routers do
    vllm-router:POLICY    vllm-router before the mock of vLLM's server over a sim engine
    ray:POLICY            a Ray Serve deployment of sim engines behind one of Ray's request routers

A rival and our restatement of its rule must agree within a tenth.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib.util import find_spec

import msgspec

from ops.bench.harness import Goal, Notice, Plan, Ratio, Sample, Samples, alternate
from ops.bench.replay import PREFILL_TOKENS_PER_S, STEP_BASE_S, summary
from ops.bench.report import Report
from ops.bench.rivals.ray_replay import ROUTERS
from ops.bench.rivals.venvs import RivalVenv
from ops.bench.routing_sides import VLLM_POLICIES, Play, Workload, opening_of

RIVALS = (*(f"vllm-router:{name}" for name in VLLM_POLICIES), *(f"ray:{name}" for name in ROUTERS))
SIDES = ("warmgate", *(f"warmgate:{name}" for name in dict.fromkeys((*VLLM_POLICIES, *ROUTERS))), *RIVALS)

AGREE_ON = ("TTFT mean s", "in time %", "prompt tokens cached %")
AGREEMENT = 0.1


@dataclass(frozen=True, slots=True)
class ReplaySide:
    """One front-end, started cold for every visit. A `harness.Side`."""

    name: str
    workload: Workload
    opening: Callable[[Workload], AbstractAsyncContextManager[Play]]

    async def start(self) -> None:
        """Nothing: each visit has replicas of its own."""

    async def sample(self) -> Sample:
        async with self.opening(self.workload) as play:
            outcomes = await play(self.workload.requests)
        return summary(outcomes, self.workload.requests, self.workload.spec.scale)

    async def stop(self) -> None:
        """Nothing is left."""


def lacking(side: str) -> str | None:
    """What this side needs and this machine has not; None when it can run."""
    if side.startswith("vllm-router") and not RivalVenv.named("vllm-router").installed:
        return "vllm-router is not installed here: python -m ops.bench.rivals install vllm-router"
    if side.startswith("ray:prefix") and find_spec("pyarrow") is None:
        return "Ray's PrefixCacheAffinityRouter imports pyarrow, which is not installed here: pip install pyarrow"
    return None


async def run(workload: Workload, wanted: Sequence[str], plan: Plan, notice: Notice) -> Report:
    """Measures one side after the other; raises BenchError when answers are wrong."""
    absent = {name: why for name in wanted if (why := lacking(name)) is not None}
    notes = list(dict.fromkeys(absent.values()))
    wanted = [name for name in wanted if name not in absent]
    sides = [ReplaySide(name, workload, opening_of(name)) for name in wanted]
    samples = await alternate(sides, plan, notice)
    spec = workload.spec
    facts = {
        "trace": workload.trace.name,
        **msgspec.to_builtins(spec),
        "seconds a visit": round(max(r.at_s for r in workload.requests)),
        "replica": f"{PREFILL_TOKENS_PER_S:g} prompt tokens/s, {1000 * STEP_BASE_S:g} ms a step",
    }
    title = f"Routing, live: {workload.trace.name} at load {spec.load:g}, {spec.num_replicas} replicas"
    return Report("routing", title, sys.argv, samples, ratios(samples), facts, notes)


def ratios(samples: Samples) -> list[Ratio]:
    """Our restatement of each rule against the rival that has it; the gateway as it ships against every rival."""
    found = []
    for rival in RIVALS:
        ours = f"warmgate:{rival.partition(':')[2]}"
        if samples.comparable(ours, rival):
            found += [_ratio(samples, metric, (ours, rival), Goal.within(AGREEMENT)) for metric in AGREE_ON]
        if samples.comparable("warmgate", rival):
            found += [_ratio(samples, metric, ("warmgate", rival), None) for metric in ("TTFT p90 s", "in time %")]
    return [ratio for ratio in found if ratio is not None]


def _ratio(samples: Samples, metric: str, sides: tuple[str, str], goal: Goal | None) -> Ratio | None:
    """None where the divisor is nothing: no token cached, nobody in time."""
    if not all(sample[metric] for sample in samples.by_side[sides[1]]):
        return None
    return samples.ratio(metric, *sides, goal)
