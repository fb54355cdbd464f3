"""`warmgate bench decision`: what choosing a replica costs an ingress, from packed token ids to the decision kept.

    hash the prompt ─► match it in the index ─► snapshot of the fleet ─► the policy ─► kept for who asks why
    └──────────────────────── timed together ────────────────────────────────────────────────────────────┘

Before each decision every replica pushes a new state, and each prompt is one that was not looked at for long: nothing
is in the processor's caches that would not be there in an ingress at work.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from gateway.garbage import settle
from gateway.homes import PLACE_EVERY_S
from gateway.router import Router
from gateway.types import Job
from ops.bench.decision_world import MAX_PENDING, PROMPT_TOKENS, DecisionWorld, Scene, Size
from ops.bench.harness import Goal, Notice, Plan, Ratio, Sample, Samples, alternate
from ops.bench.report import Report
from replicas.contract import GenerateRequest
from routing.policies import POLICIES
from routing.policy import Policy

P50, P99 = "decision µs p50", "decision µs p99"
GOALS = {P50: Goal.at_most(150), P99: Goal.at_most(500)}

IDLE = Scene("idle", busy=False, order="fcfs")
FIRST_COME = Scene("busy", busy=True, order="fcfs")
SHORTEST = Scene("busy, shortest first", busy=True, order="shortest")
ADAPTERS = Scene("busy, shortest first, adapters", busy=True, order="shortest", adapters=True)

OURS = "warm"
RIVALS = ("overlap_cost", "greedy_ttft")
SETTINGS = (
    *((OURS, scene) for scene in (IDLE, FIRST_COME, SHORTEST, ADAPTERS)),
    *((rival, SHORTEST) for rival in RIVALS),
)

NUM_DECISIONS = 1000
"""A visit."""

BETWEEN_S = 0.02
"""Of the world's time, from one decision to the next."""

_YIELD_EVERY = 20
"""Decisions between two turns of the event loop, which has its own timers to serve."""


@dataclass(slots=True)
class _Times:
    """Seconds of each part, by decision."""

    whole: list[float] = field(default_factory=list)
    hash: list[float] = field(default_factory=list)
    match: list[float] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)
    snapshot: list[float] = field(default_factory=list)
    policy: list[float] = field(default_factory=list)
    placed: list[float] = field(default_factory=list)
    push: list[float] = field(default_factory=list)

    def sample(self) -> Sample:
        ranked = sorted(self.whole)
        return {
            P50: 1e6 * statistics.median(ranked),
            P99: 1e6 * ranked[int(0.99 * (len(ranked) - 1))],
            "hash µs": _median_us(self.hash),
            "match µs": _median_us(self.match),
            "snapshot, policy, keeping µs": _median_us(self.rest),
            "of which snapshot µs": _median_us(self.snapshot),
            "of which policy µs": _median_us(self.policy),
            "afterwards: placing it µs": _median_us(self.placed),
            "meanwhile: a replica's push µs": _median_us(self.push),
        }


class Shared:
    """One world for all sides: it takes half a gigabyte."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self._world: DecisionWorld | None = None

    async def world(self) -> DecisionWorld:
        if self._world is None:
            self._world = DecisionWorld(self.size)
            await self._world.start()
            settle()  # as an ingress does once it is up
        return self._world

    async def close(self) -> None:
        """Idempotent."""
        world, self._world = self._world, None
        if world is not None:
            await world.close()
            gc.unfreeze()


class Deciding:
    """One policy in one scene, `num_decisions` of them a visit. A `harness.Side`."""

    def __init__(self, shared: Shared, policy: str, scene: Scene, num_decisions: int) -> None:
        self.name = side_name(policy, scene)
        self._shared = shared
        self._policy = policy
        self._scene = scene
        self._num_decisions = num_decisions

    async def start(self) -> None:
        await self._shared.world()

    async def stop(self) -> None:
        await self._shared.close()

    async def sample(self) -> Sample:
        world = await self._shared.world()
        jobs = list(world.set(self._scene))
        Random(1).shuffle(jobs)
        times = _Times()
        router = world.router(self._policy)
        await _placed_before(router, jobs)
        decide = _decider(world, router, POLICIES[self._policy].decide, times)
        for number in range(self._num_decisions):
            began = time.perf_counter()
            for link in world.links:
                link.push()
            times.push.append((time.perf_counter() - began) / len(world.links))
            world.now += BETWEEN_S
            decide(jobs[number % len(jobs)])
            if number % _YIELD_EVERY == 0:
                await asyncio.sleep(0)
        return times.sample()


async def _placed_before(router: Router, jobs: Sequence[Job]) -> None:
    """Every conversation has been here once, and where its adapter should live has been worked out since."""
    for job in jobs:
        request = router.request(job)
        router.placed(request, router.decide(request))
    if jobs[0].adapter is not None:
        await asyncio.sleep(1.1 * PLACE_EVERY_S)


def _decider(world: DecisionWorld, router: Router, policy: Policy, times: _Times) -> Callable[[Job], None]:
    """Routes a job as the gateway does, and sends it where it should go; notes how long each part took."""
    match, fleet, clock = world.index.match, world.fleet, time.perf_counter

    def decide(job: Job) -> None:
        t0 = clock()
        request = router.request(job)
        t1 = clock()
        match(request.block_hashes)  # as admission does, to know what it will cost
        t2 = clock()
        decision = router.decide(request)
        t3 = clock()
        snapshot = router.snapshot(request)  # the parts once more, by themselves
        t4 = clock()
        policy(request, snapshot)
        t5 = clock()
        router.placed(request, decision)
        t6 = clock()
        times.whole.append(t3 - t0)
        times.hash.append(t1 - t0)
        times.match.append(t2 - t1)
        times.rest.append(t3 - t2)
        times.snapshot.append(t4 - t3)
        times.policy.append(t5 - t4)
        times.placed.append(t6 - t5)
        winner = decision.winner
        assert winner is not None, f"nobody takes {job.request_id}"
        num_uncached = job.num_prompt_tokens - winner.matched_tokens
        attempt = GenerateRequest(request_id=job.request_id, prompt=job.prompt, sampling=job.sampling)
        fleet.place(winner.replica_id, attempt, num_uncached).close()

    return decide


async def run(size: Size, num_decisions: int, plan: Plan, notice: Notice) -> Report:
    """Measures every side in turn."""
    shared = Shared(size)
    sides = [Deciding(shared, policy, scene, num_decisions) for policy, scene in SETTINGS]
    samples = await alternate(sides, plan, notice)
    title = f"Routing decision: {PROMPT_TOKENS:,} prompt tokens, {size.num_replicas} replicas"
    facts = {
        "index entries": size.num_replicas * size.num_blocks,
        "decisions a visit": num_decisions,
        "pending prompts of a busy replica": f"0 to {MAX_PENDING}",
        "adapters": size.num_adapters,
        "adapter slots of a replica": size.num_slots,
    }
    notes = [
        "overlap_cost and greedy_ttft are `routing/baselines` over the same snapshot: their terms are not kept.",
        'The parts in "of which" are taken again after the decision, when what they read is in the caches.',
    ]
    return Report("decision", title, samples, list(ratios(samples)), facts, notes)


def ratios(samples: Samples) -> Iterator[Ratio]:
    """Ours against the goals, then against the rivals in the same scene."""
    ours: Sequence[str] = [side_name(policy, scene) for policy, scene in SETTINGS if policy == OURS]
    for metric, goal in GOALS.items():
        for side in ours:
            if samples.comparable(side):
                yield Ratio(metric, side, "1 µs", samples.spread(side, metric), goal)
    for rival in RIVALS:
        sides = side_name(OURS, SHORTEST), side_name(rival, SHORTEST)
        if samples.comparable(*sides):
            yield samples.ratio(P50, *sides)


def side_name(policy: str, scene: Scene) -> str:
    return f"{policy}: {scene.name}"


def _median_us(seconds: list[float]) -> float:
    return 1e6 * statistics.median(seconds)
