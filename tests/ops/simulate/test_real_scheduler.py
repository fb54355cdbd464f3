"""The simulator against the engines' own scheduler and block pool, step by step on a virtual clock (`sim_engine`)."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import pytest

from configs.schema import EngineConfig, SimConfig
from ops.simulate.calibration import Calibration
from ops.simulate.replica import ReplicaSpec, SimReplica
from ops.simulate.trace import Trace, TraceRequest
from replicas.contract import GenerateRequest, SamplingParams
from replicas.engine.core import EngineCore
from replicas.engine.order import OrderName
from replicas.sim_engine import SimOptions, build_sim
from replicas.sim_model import SimModel
from tests.ops.simulate.making import conversations
from tests.ops.simulate.test_replica import play

COSTS = Calibration(prefill_tokens_per_s=8000.0, step_base_s=0.006, step_per_sequence_s=0.00035)
BLOCK_TOKENS = 16


@dataclass
class Clock:
    now: float = 0.0

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Real:
    """The sim engine's core, played like the simulated replica. Tokens are made of block hashes, so blocks are shared
    just where the trace says."""

    core: EngineCore
    clock: Clock
    first_s: dict[int, float] = field(default_factory=dict)
    end_s: dict[int, float] = field(default_factory=dict)

    def play(self, trace: Trace) -> None:
        todo = list(enumerate(trace.requests))
        scheduler = self.core.scheduler
        while todo or scheduler.has_work:
            while todo and todo[0][1].arrival_s <= self.clock.now:
                number, request = todo.pop(0)
                scheduler.add(generate(number, request))
            if not scheduler.has_work:
                self.clock.now = todo[0][1].arrival_s
                continue
            for delta in self.core.step():
                number = int(delta.request_id)
                self.first_s.setdefault(number, self.clock.now)
                if delta.finish_reason is not None:
                    self.end_s[number] = self.clock.now


def generate(number: int, request: TraceRequest) -> GenerateRequest:
    tokens = array("I")
    for block in request.blocks:
        tokens.extend((block >> shift) % 50_000 for shift in range(BLOCK_TOKENS))
    tokens.extend((number * 31 + i) % 50_000 for i in range(request.num_prompt - len(tokens)))
    sampling = SamplingParams(max_tokens=request.num_output, seed=1, temperature=0.0, ignore_eos=True)
    return GenerateRequest(request_id=str(number), prompt=tokens.tobytes(), sampling=sampling)


def real(order: OrderName) -> Real:
    sim = SimConfig(
        prefill_tokens_per_s=COSTS.prefill_tokens_per_s,
        step_base_s=COSTS.step_base_s,
        step_per_sequence_s=COSTS.step_per_sequence_s,
        num_blocks=4000,
        max_model_len=60_000,
    )
    config = EngineConfig(
        kind="sim", block_size=BLOCK_TOKENS, max_num_seqs=64, max_num_batched_tokens=256, order=order, sim=sim
    )
    clock = Clock()
    model = SimModel(60_000, (59_999,), tuple(range(100)))
    built = build_sim(config, model, "m", SimOptions(clock=clock.read, sleep=clock.sleep))
    return Real(built.core, clock)


@pytest.mark.parametrize(("order", "within"), [("fcfs", 0.005), ("shortest", 0.03)])
@pytest.mark.parametrize("per_s", [14.0, 34.0])
def test_times_to_first_tokens_are_those_of_the_real_scheduler(order: OrderName, within: float, per_s: float) -> None:
    """At 34/s it is nearly always busy. Its arrivals are ranked when the step under way has ended, ours at once, and
    its blocks grow as answers do, ours are reserved: small differences, and neighbours that change places."""
    trace = conversations(250, per_s, seed=3)
    stepped = real(order)
    stepped.play(trace)
    spec = ReplicaSpec(64_000, 64, 256, order, calibration=COSTS)
    skipped = play(SimReplica(spec, BLOCK_TOKENS), trace.requests)
    ours = [skipped[i][0] - r.arrival_s for i, r in enumerate(trace.requests)]
    theirs = [stepped.first_s[i] - r.arrival_s for i, r in enumerate(trace.requests)]
    assert sum(ours) == pytest.approx(sum(theirs), rel=within)
    ends = [skipped[i][1] for i in range(250)]
    assert sum(ends) == pytest.approx(sum(stepped.end_s.values()), rel=0.001)
    if order == "fcfs":
        assert max(abs(one - other) for one, other in zip(ours, theirs, strict=True)) < 3 * COSTS.step_s(8, 0)
