"""What the engine's tests share: a clock that is turned by hand, small sim engines, and the slow obvious answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from configs.schema import EngineConfig, SimConfig
from replicas.contract import AdapterSpec, GenerateRequest, SamplingParams, StepDelta, pack_tokens
from replicas.engine.core import EngineCore
from replicas.engine.sequence import Plan, StepResult
from replicas.sim_engine import SimOptions, SimRunner, build_sim
from replicas.sim_model import SimModel, next_state, root_state

VOCAB_SIZE = 259
EOS = 257
LETTERS = tuple(range(97, 123))


@dataclass
class VirtualClock:
    """Time passes only in `sleep`."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


class CheckedRunner:
    """Runs the sim's runner, and before each step looks at everything it is about to read and write."""

    def __init__(self, inner: SimRunner, core: EngineCore) -> None:
        self.inner = inner
        self.core = core
        self.plans: list[Plan] = []

    def execute(self, plan: Plan) -> StepResult:
        self.plans.append(plan)
        config, pool = self.core.scheduler.config, self.core.scheduler.pool
        assert 0 < plan.num_tokens <= config.max_num_batched_tokens
        assert len(plan.items) <= config.max_num_seqs
        sources = dict((target, source) for source, target in plan.copies)
        written: set[int] = set()
        for item in plan.items:
            seq, size = item.seq, pool.block_size
            assert item.start == seq.num_computed and item.num_tokens > 0
            assert item.samples == (item.start + item.num_known == seq.num_tokens)
            assert item.samples or not item.drafts
            state = root_state(seq.request.adapter)
            for position in range(item.start):
                state = next_state(state, seq.tokens[position])
                block_id = seq.block_ids[position // size]
                held = self.inner.kv[sources.get(block_id, block_id) * size + position % size]
                assert held == state, f"{seq.request_id}: wrong KV at {position=}"
            for i in range(item.start // size, (item.start + item.num_tokens - 1) // size + 1):
                block_id = seq.block_ids[i]
                assert pool.num_refs(block_id) == 1 and block_id not in pool._cached, "a shared block is written"
                assert block_id not in written, "two sequences write one block"
                written.add(block_id)
        return self.inner.execute(plan)


@dataclass
class Kit:
    """One sim engine without a thread, on a virtual clock, with a checked runner."""

    core: EngineCore
    model: SimModel
    clock: VirtualClock
    runner: CheckedRunner
    deltas: dict[str, list[StepDelta]] = field(default_factory=dict)

    def add(self, request: GenerateRequest) -> None:
        self.core.add(request)
        self.deltas[request.request_id] = []

    def step(self) -> list[StepDelta]:
        deltas = self.core.step()
        assert self.core.dead is None, self.core.dead
        for delta in deltas:
            assert not self.ended(delta.request_id), "a delta after the terminal one"
            self.deltas[delta.request_id].append(delta)
        self.core.scheduler.check()
        return deltas

    def run(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError(f"still at work after {max_steps} steps")

    def ended(self, request_id: str) -> bool:
        deltas = self.deltas[request_id]
        return bool(deltas) and deltas[-1].finish_reason is not None

    def tokens(self, request_id: str) -> list[int]:
        return [token_id for delta in self.deltas[request_id] for token_id in delta.token_ids]

    def last(self, request_id: str) -> StepDelta:
        return self.deltas[request_id][-1]

    def expected(self, request: GenerateRequest) -> list[int]:
        """What the request must produce, the tokens of earlier attempts left out."""
        prompt = list(memoryview(request.prompt).cast("I"))
        num_earlier = len(request.produced) // 4
        return self.model.generate(prompt, request.sampling, request.adapter)[num_earlier:]


def engine_config(**changes: Any) -> EngineConfig:
    """A small engine: 32 blocks of 4 tokens, 8 sequences, 16 tokens a step."""
    sim_changes = {name: changes.pop(name) for name in list(changes) if name in SimConfig.__struct_fields__}
    sim = SimConfig(**{"num_blocks": 32, **sim_changes})
    limits = {"kind": "sim", "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 16}
    return EngineConfig(**{**limits, **changes, "sim": sim})


def make_kit(**changes: Any) -> Kit:
    """Changes are fields of EngineConfig or SimConfig."""
    config = engine_config(**changes)
    clock = VirtualClock()
    model = SimModel(VOCAB_SIZE, (EOS,), LETTERS, config.sim.mean_output_tokens)
    core = build_sim(config, model, "sim", SimOptions(LETTERS, clock, clock.sleep)).core
    assert isinstance(core.runner, SimRunner)
    runner = CheckedRunner(core.runner, core)
    core.runner = runner
    return Kit(core, model, clock, runner)


def make_request(request_id: str, prompt: Iterable[int], **changes: Any) -> GenerateRequest:
    """Changes are fields of SamplingParams or GenerateRequest; greedy unless said otherwise."""
    defaults: dict[str, Any] = {"max_tokens": 4, "seed": 7, "temperature": 0.0}
    sampling = {name: changes.pop(name) for name in list(changes) if name in SamplingParams.__struct_fields__}
    return GenerateRequest(
        request_id=request_id,
        prompt=pack_tokens(list(prompt)),
        sampling=SamplingParams(**{**defaults, **sampling}),
        **changes,
    )


def adapter(adapter_id: str, rank: int = 8) -> AdapterSpec:
    return AdapterSpec(adapter_id=adapter_id, rank=rank)
