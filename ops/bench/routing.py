"""`warmgate bench routing`: one slice of a trace, live, through our gateway and through others' routers.

Every side has the same sim replicas (real scheduler and block pool), cold at each visit, that take prompts first come,
first served; ours as it ships may order them:

    warmgate                 the gateway as it ships: its policy, late binding, prefill order
    warmgate:POLICY          the gateway with a policy by name and every request sent at once, as other routers do
    vllm-router:POLICY       vllm-router before the mock of vLLM's server over a sim engine
    ray:POLICY               a Ray Serve deployment of sim engines behind one of Ray's request routers
    warmgate-in-ray:POLICY   the same deployment behind `routing.ray_router` with our restatement of that rule

A rival and our restatement of its rule, both in the same place, must agree within a tenth: in what came of the
requests, and in the choices themselves (`ops.bench.choices`). How far a rival agrees with itself from visit to visit is
told beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from random import Random

import msgspec

from ops.bench.choices import explained
from ops.bench.harness import Goal, Notice, Plan, Ratio, Sample, Samples, Spread, alternate
from ops.bench.replay import Play, summary
from ops.bench.replay_ray import RayReplays
from ops.bench.report import Report
from ops.bench.rivals.ray_replay import ROUTERS
from ops.bench.rivals.venvs import RivalVenv
from ops.bench.routing_sides import VLLM_POLICIES, Workload, opening_of
from ops.bench.trace_slice import PREFILL_TOKENS_PER_S, STEP_BASE_S
from routing.policies import POLICIES

PAIRS = {
    **{f"vllm-router:{name}": f"warmgate:{name}" for name in VLLM_POLICIES},
    **{f"ray:{name}": f"warmgate-in-ray:{name}" for name in ROUTERS},
}
"""Our restatement, in the same place, by the rival that it restates."""

SIDES = ("warmgate", *dict.fromkeys(side for rival, ours in PAIRS.items() for side in (ours, rival)))

EVERY = (*SIDES, *dict.fromkeys(f"{front}:{name}" for front in ("warmgate", "warmgate-in-ray") for name in POLICIES))
"""What can be asked for: any policy of ours as well."""

CHOICES = "choices by the rule"
AGREE_ON = ("TTFT mean s", "in time %", "prompt tokens cached %")
AGREEMENT = 0.1
ITSELF = "itself"


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
        found = dict(summary(outcomes, self.workload.requests, self.workload.spec.scale))
        rule = self.name.partition(":")[2]
        if self.name in PAIRS:
            found[CHOICES] = explained(POLICIES[rule], self.workload.requests, outcomes, Random(0))
        return found

    async def stop(self) -> None:
        """Nothing is left."""


def lacking(side: str) -> str | None:
    """What this side needs and this machine has not; None when it can run."""
    if side.startswith("vllm-router") and not RivalVenv.named("vllm-router").installed:
        return "vllm-router is not installed here: python -m ops.bench.rivals install vllm-router"
    if side.startswith("ray:prefix") and find_spec("pyarrow") is None:
        install = f"{sys.executable} -m pip install pyarrow"
        return f"Ray's PrefixCacheAffinityRouter imports pyarrow, which is not installed here: {install}"
    return None


async def run(workload: Workload, wanted: Sequence[str], plan: Plan, notice: Notice) -> Report:
    """Measures one side after the other; raises BenchError when answers are wrong."""
    absent = {name: why for name in wanted if (why := lacking(name)) is not None}
    notes = list(dict.fromkeys(absent.values()))
    async with RayReplays() as rays:
        present = [name for name in wanted if name not in absent]
        sides = [ReplaySide(name, workload, opening_of(name, rays)) for name in present]
        samples = await alternate(sides, plan, notice)
    spec = workload.spec
    facts = {
        "trace": workload.trace.name,
        **msgspec.to_builtins(spec),
        "seconds a visit": round(max(r.at_s for r in workload.requests)),
        "replica": f"{PREFILL_TOKENS_PER_S:g} prompt tokens/s, {1000 * STEP_BASE_S:g} ms a step",
    }
    title = f"Routing, live: {workload.trace.name} at load {spec.load:g}, {spec.num_replicas} replicas"
    name = f"routing-{spec.num_replicas}"  # a section for each size of fleet
    found = list(ratios(samples))
    return Report(name, title, samples, found, facts, [*notes, *luck(found)])


def ratios(samples: Samples) -> Iterator[Ratio]:
    """Our restatement of each rule against the rival that has it, the rival against itself and against the rule asked
    again, and the gateway as it ships against every rival."""
    for rival, ours in PAIRS.items():
        if samples.comparable(rival):
            yield Ratio(CHOICES, rival, "the rule asked again", samples.spread(rival, CHOICES), Goal.within(AGREEMENT))
        if samples.comparable(ours, rival):
            for metric in AGREE_ON:
                yield from _ratio(samples, metric, (ours, rival), Goal.within(AGREEMENT))
                yield from _with_itself(samples, metric, rival)
        if samples.comparable("warmgate", rival):
            for metric in ("TTFT mean s", "TTFT p90 s", "in time %"):
                yield from _ratio(samples, metric, ("warmgate", rival), None)


def luck(found: Sequence[Ratio]) -> Iterator[str]:
    """A sentence for each disagreement that is no larger than a rival's with itself."""
    itself = {(r.side, r.metric): r.spread for r in found if r.against == ITSELF}
    for ratio in found:
        own = itself.get((ratio.against, ratio.metric))
        if ratio.reached is not False or own is None:
            continue
        least, most = min(own.low, 1 / own.high), max(own.high, 1 / own.low)
        if least <= ratio.spread.median <= most:
            yield (
                f"{ratio.against}, {ratio.metric}: {ratio.spread.median:.3g} times, "
                f"but from one visit to the next it is {own.low:.3g} to {own.high:.3g} times its own."
            )


def _ratio(samples: Samples, metric: str, sides: tuple[str, str], goal: Goal | None) -> Iterator[Ratio]:
    """Nothing where the divisor is nothing: no token cached, nobody in time."""
    if all(metric in sample and sample[metric] for sample in samples.by_side[sides[1]]):
        yield samples.ratio(metric, *sides, goal)


def _with_itself(samples: Samples, metric: str, rival: str) -> Iterator[Ratio]:
    """Every visit against the one before: what luck and the machine do."""
    visits = [sample[metric] for sample in samples.by_side[rival] if metric in sample]
    if len(visits) > 1 and all(visits):
        yield Ratio(metric, rival, ITSELF, Spread.of([after / before for before, after in pairwise(visits)]))
