"""Fair queue and prefill order together: shortest first takes nothing from a tenant whose prompts are long."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from gateway.fair_queue import INPUT_WEIGHT, OUTPUT_WEIGHT, Charge, FairQueue
from gateway.types import Job, Tenant
from replicas.contract import SamplingParams, pack_tokens
from replicas.engine.block_pool import BlockPool
from replicas.engine.core import EngineCore
from replicas.engine.scheduler import Scheduler, SchedulerConfig
from replicas.engine.sequence import Plan, Sampled, StepResult
from tests.gateway.links import MODEL
from tests.replicas.engine_kit import VirtualClock, make_request

MAX_AHEAD = 8
NUM_PLACES = 4
RATE = 1000.0


@dataclass(eq=False)
class Backlog:
    """One job in the ingress's queue, as admission has it."""

    job: Job
    num_uncached: int


@dataclass
class Bench:
    """Two tenants that always have jobs waiting, the real fair queue, the real scheduler, `MAX_AHEAD` let out ahead.

    `tags`: whether the engine hears of the fair tags; `tag_weights`: whether it hears of the tenants' weights.
    """

    sizes: dict[str, int]
    max_tokens: int
    tags: bool = True
    weights: dict[str, float] = field(default_factory=dict)
    tag_weights: bool = True
    now: VirtualClock = field(default_factory=lambda: VirtualClock(0.0))
    served: dict[str, float] = field(default_factory=dict)
    history: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = SchedulerConfig(
            max_model_len=8192, max_num_seqs=NUM_PLACES, max_num_batched_tokens=64, order="shortest"
        )
        self.core = EngineCore(Scheduler(config, BlockPool(4096, 16), self.now), self, self.now)
        self.queue: FairQueue[Backlog] = FairQueue()
        self.charges: dict[str, tuple[Backlog, Charge]] = {}
        self.served = dict.fromkeys(self.sizes, 0.0)
        self.rng = random.Random(3)
        self.num_jobs = 0
        for tenant_id in self.sizes:
            for _ in range(3):
                self.push(tenant_id)

    def push(self, tenant_id: str) -> None:
        self.num_jobs += 1
        length = self.rng.randint(self.sizes[tenant_id] // 2, self.sizes[tenant_id])
        sampling = SamplingParams(max_tokens=self.max_tokens, seed=0)
        job = Job(
            f"r{self.num_jobs}",
            MODEL,
            Tenant(tenant_id, b"", self.weight(tenant_id)),
            pack_tokens([1] * length),
            sampling,
            b"",
        )
        self.queue.push(Backlog(job, length))

    def execute(self, plan: Plan) -> StepResult:
        """The model: every token takes its time, and counts as service for its tenant."""
        self.now.sleep(plan.num_tokens / RATE)
        for item in plan.items:
            num_prompt = max(0, min(item.seq.num_prompt, item.start + item.num_tokens) - item.start)
            self.served[item.seq.request.tenant] += INPUT_WEIGHT * num_prompt + OUTPUT_WEIGHT * item.samples
        return StepResult(tuple((Sampled(97),) for item in plan.items if item.samples))

    def step(self) -> None:
        scheduler = self.core.scheduler
        while scheduler.num_waiting + scheduler.num_running < NUM_PLACES + MAX_AHEAD:
            waiting, charge = self.queue.pop()
            self.push(waiting.job.tenant.tenant_id)
            self.charges[waiting.job.request_id] = (waiting, charge)
            salt = waiting.job.request_id.encode()  # nothing in common with anybody
            self.core.add(
                make_request(waiting.job.request_id, [1] * waiting.num_uncached, max_tokens=self.max_tokens, salt=salt,
                             tenant=waiting.job.tenant.tenant_id, fair_tag=charge.tag if self.tags else 0.0,
                             fair_weight=charge.weight if self.tag_weights else 1.0)
            )  # fmt: skip
        for delta in self.core.step():
            if delta.finish_reason is not None:
                waiting, charge = self.charges.pop(delta.request_id)
                self.queue.settle(charge, waiting.num_uncached, self.max_tokens)
        if len(self.history) % 100 == 0:
            scheduler.check()
        one, other = (served / self.weight(tenant_id) for tenant_id, served in self.served.items())
        self.history.append(one - other)

    def weight(self, tenant_id: str) -> float:
        return self.weights.get(tenant_id, 1.0)

    @property
    def widest(self) -> float:
        """The most by which one tenant was served more than the other, for its weight, over any interval."""
        return max(self.history) - min(self.history)

    @property
    def bound(self) -> float:
        """Twice the larger of the longest prompt and the output tokens in flight, weighted; per unit of weight."""
        longest = max(INPUT_WEIGHT * size / self.weight(tenant_id) for tenant_id, size in self.sizes.items())
        in_flight = OUTPUT_WEIGHT * (NUM_PLACES + MAX_AHEAD) * self.max_tokens
        return 2 * max(longest, in_flight / min(map(self.weight, self.sizes)))


@pytest.mark.parametrize(
    ("sizes", "max_tokens"),
    [
        ({"chat": 64, "books": 2000}, 1),
        ({"chat": 64, "books": 2000}, 30),
        ({"chat": 500, "books": 2000}, 4),
        ({"chat": 1000, "books": 2000}, 1),
        ({"chat": 2000, "books": 2000}, 2),
        ({"chat": 64, "books": 400}, 60),
    ],
)
def test_two_backlogged_tenants_stay_within_the_bound_of_virtual_token_counters(
    sizes: dict[str, int], max_tokens: int
) -> None:
    bench = Bench(sizes, max_tokens)
    for _ in range(4000):
        bench.step()
    assert min(bench.served.values()) > 20 * max(sizes.values()), "both were served all along"
    assert bench.widest <= bench.bound


def test_without_tags_short_prompts_would_take_more_than_their_share_for_a_while() -> None:
    """What the tags are for: the same bench breaks the bound when the engine does not hear of them."""
    benches = [Bench({"chat": 1000, "books": 2000}, 1, tags=tags) for tags in (True, False)]
    for bench in benches:
        for _ in range(4000):
            bench.step()
    assert benches[0].widest < benches[0].bound < benches[1].widest


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [
        ({"chat": 1000, "books": 2000}, {"books": 4.0}),
        ({"chat": 1000, "books": 2000}, {"chat": 4.0}),
        ({"chat": 2000, "books": 2000}, {"chat": 2.0, "books": 0.5}),
    ],
)
def test_tenants_of_different_weight_stay_within_the_bound_for_their_weights(
    sizes: dict[str, int], weights: dict[str, float]
) -> None:
    bench = Bench(sizes, 1, weights=weights)
    for _ in range(4000):
        bench.step()
    assert min(bench.served.values()) > 5 * max(sizes.values()), "both were served all along"
    assert bench.widest <= bench.bound


def test_finish_tags_without_weights_would_hold_the_heavier_tenant_back() -> None:
    """A heavy tenant's long prompt adds little to its virtual time: short ones of a light tenant may not all pass."""
    benches = [Bench({"chat": 64, "books": 2000}, 1, weights={"books": 8.0}, tag_weights=w) for w in (True, False)]
    for bench in benches:
        for _ in range(3000):
            bench.step()
    assert benches[0].widest <= benches[0].bound < benches[1].widest
