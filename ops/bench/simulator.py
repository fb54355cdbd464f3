"""`warmgate bench simulator`: one slice of a trace, live through the gateway and on the simulator's virtual clock.

The live side is a whole stack: Valkey, an ingress, sim replicas, a process each, asked over HTTP. The simulated side
has what `warmgate simulate calibrate` measures of those replicas, over the same HTTP, and nothing else of them. Whoever
plans with the simulator wants both to tell the same: first tokens, how many are in time, what the caches spared.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec

from configs.schema import Config
from ops.bench.harness import Goal, Notice, Plan, Ratio, Sample, Samples, alternate
from ops.bench.replay import Outcome, summary
from ops.bench.report import Report
from ops.bench.routing_sides import ALWAYS_FREE, Workload, warmgate
from ops.bench.stack import MODEL, Stack
from ops.bench.trace_slice import BLOCK_SIZE
from ops.simulate.calibrate import Measuring, calibrate_live
from ops.simulate.calibration import Calibration
from ops.simulate.driver import run as simulate
from ops.simulate.fleet import FleetSpec
from ops.simulate.replica import ReplicaSpec
from replicas.kv_publisher import PublisherOptions
from routing.kv_registry import KvRegistryOptions
from routing.policies import POLICIES

SHIPPED = "warm"
PLAYED = (SHIPPED, "least_outstanding")
"""The gateway as it ships, and a rule that sees no more than numbers of requests, before first-come replicas."""

AGREE_ON = ("TTFT mean s", "TTFT p50 s", "TTFT p95 s", "in time %", "prompt tokens cached %")
AGREEMENT = 0.1

NUM_SEEDS = 20

PUSH_S = 0.001
"""How late a replica's state arrives over a channel on one machine."""


@dataclass(frozen=True, slots=True)
class Live:
    """The stack itself, cold at every visit. A `harness.Side`."""

    policy: str
    workload: Workload

    @property
    def name(self) -> str:
        return f"live: {self.policy}"

    async def start(self) -> None:
        """Nothing: each visit has a stack of its own."""

    async def sample(self) -> Sample:
        async with warmgate(self.workload, _named(self.policy)) as play:
            outcomes = await play(self.workload.requests)
        return summary(outcomes, self.workload.requests, self.workload.spec.scale)

    async def stop(self) -> None:
        """Nothing is left."""


@dataclass(slots=True)
class Simulated:
    """The same fleet on the virtual clock: the mean of `NUM_SEEDS` runs, others at every visit. A `harness.Side`."""

    policy: str
    workload: Workload
    calibration: Calibration
    num_visits: int = 0

    @property
    def name(self) -> str:
        return f"simulated: {self.policy}"

    async def start(self) -> None:
        """Nothing."""

    async def sample(self) -> Sample:
        self.num_visits += 1
        seeds = range(NUM_SEEDS * self.num_visits, NUM_SEEDS * (self.num_visits + 1))
        runs = await asyncio.to_thread(lambda: [self._run(seed) for seed in seeds])
        return {metric: statistics.fmean(run[metric] for run in runs) for metric in runs[0]}

    def _run(self, seed: int) -> Sample:
        workload = self.workload
        fleet = replace(fleet_of(workload.profile(_named(self.policy)), self.calibration), seed=seed)
        trace = workload.scaled
        load = trace.num_prompt_tokens / (fleet.tokens_per_s * trace.duration_s)  # that is: at the trace's own times
        found = simulate(trace, self.policy, fleet, load)
        outcomes = [
            Outcome(ttft_s, request.num_prompt, num_cached)
            for ttft_s, num_cached, request in zip(found.ttfts_s, found.num_cached, trace.requests, strict=True)
        ]
        return summary(outcomes, workload.requests, workload.spec.scale)

    async def stop(self) -> None:
        """Nothing."""


def fleet_of(config: Config, calibration: Calibration) -> FleetSpec:
    """What a stack with this profile is to the simulator, its first group being the only one."""
    group = config.groups[0]
    engine = group.engine
    max_ahead = config.admission.max_ahead_per_replica
    return FleetSpec(
        num_replicas=group.replicas,
        replica=ReplicaSpec(
            kv_tokens=engine.sim.num_blocks * BLOCK_SIZE,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            order=engine.order,
            calibration=calibration,
        ),
        stats_delay_s=PUSH_S,
        events_delay_s=(PublisherOptions().publish_s + KvRegistryOptions().poll_s) / 2,
        max_ahead=None if max_ahead == ALWAYS_FREE else max_ahead,
        look_ahead=config.admission.look_ahead if POLICIES[config.routing.policy].weighs_seconds else 0,
    )


async def calibrated(workload: Workload) -> Calibration:
    """What the simulator needs to know of the replicas, measured through a gateway like any user would."""
    config = workload.profile(None)
    measuring = Measuring(MODEL, max_num_batched_tokens=config.groups[0].engine.max_num_batched_tokens)
    async with Stack(config) as stack:
        return await calibrate_live(f"http://127.0.0.1:{stack.port}", measuring)


async def run(workload: Workload, policies: Sequence[str], plan: Plan, notice: Notice) -> Report:
    """Calibrates, then plays the slice both ways."""
    notice("calibrating")
    calibration = await calibrated(workload)
    sides: list[Live | Simulated] = []
    for policy in policies:
        sides += [Live(policy, workload), Simulated(policy, workload, calibration)]
    samples = await alternate(sides, plan, notice)
    spec = workload.spec
    facts = {
        "trace": workload.trace.name,
        **msgspec.to_builtins(spec),
        "seconds a visit": round(max(r.at_s for r in workload.requests)),
        "calibration": msgspec.to_builtins(calibration),
    }
    title = f"The simulator beside what it simulates: {spec.num_replicas} replicas at load {spec.load:g}"
    return Report("simulator", title, samples, list(ratios(samples, policies)), facts)


def ratios(samples: Samples, policies: Sequence[str]) -> Iterator[Ratio]:
    """Simulated over live, figure by figure."""
    for policy in policies:
        for metric in AGREE_ON:
            yield samples.ratio(metric, f"simulated: {policy}", f"live: {policy}", Goal.within(AGREEMENT))


def _named(policy: str) -> str | None:
    """As `Workload.profile` wants it: what ships has no name there."""
    return None if policy == SHIPPED else policy
