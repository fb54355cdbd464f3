"""An engine that pretends: the real scheduler, block pool and step loop around a model that is a hash and a clock.

For tests, for benchmarks of everything around an engine, and for trying the gateway without weights. The KV cache is
real in the sense that matters: each token's state is written to its block's slot and read back through the block table,
so a wrong block table gives wrong text. Neither torch nor transformers is imported.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from configs.schema import EngineConfig, SimConfig
from replicas.contract import AdapterSpec, EngineError, EngineFacts, TokenLogprob
from replicas.engine.block_pool import BlockPool
from replicas.engine.core import EngineCore
from replicas.engine.loop import BuiltEngine, ThreadedEngine
from replicas.engine.scheduler import Scheduler, SchedulerConfig
from replicas.engine.sequence import Plan, PlanItem, Sampled, StepResult
from replicas.sim_model import MASK, STEP, SimModel, root_state

PRINTABLE_ASCII = tuple(range(0x20, 0x7F))
"""What `sim:bytes` shows as text: its ids below 256 are bytes."""

_REFERENCE_RANK = 8


@dataclass(frozen=True, slots=True)
class SimOptions:
    """What tests replace: the ids the model speaks in, the clock (seconds, monotonic) and how time passes."""

    alphabet: tuple[int, ...] = PRINTABLE_ASCII
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def sim_engine(
    config: EngineConfig,
    vocab_size: int,
    eos_token_ids: tuple[int, ...],
    model_name: str,
    options: SimOptions | None = None,
) -> ThreadedEngine:
    """A sim engine for `config.sim`, not yet started. Raises ValueError when the alphabet is not in the vocabulary."""
    chosen = options or SimOptions()
    model = SimModel(vocab_size, tuple(eos_token_ids), chosen.alphabet, config.sim.mean_output_tokens)
    return ThreadedEngine(lambda: build_sim(config, model, model_name, chosen), chosen.clock)


def build_sim(config: EngineConfig, model: SimModel, model_name: str, options: SimOptions) -> BuiltEngine:
    """The core alone, without a thread: `core.step()` runs it on whatever clock `options` has."""
    sim = config.sim
    pool = BlockPool(sim.num_blocks, config.block_size)
    limits = SchedulerConfig.from_engine(config, config.max_model_len or sim.max_model_len, model.eos_token_ids)
    scheduler = Scheduler(replace(limits, max_adapters=sim.max_adapters), pool, options.clock)
    adapters = SimAdapters(sim, options.sleep)
    runner = SimRunner(model, pool, adapters, Pace(sim, options))
    facts = EngineFacts(
        engine="sim",
        model=model_name,
        vocab_size=model.vocab_size,
        max_model_len=scheduler.max_len,
        block_size=pool.block_size,
        num_blocks=pool.num_blocks,
        max_num_seqs=scheduler.max_running,
        max_num_batched_tokens=config.max_num_batched_tokens,
        eos_token_ids=model.eos_token_ids,
        dtype="hash",
        device="sim",
        prefill_order=config.order,
        max_adapters=sim.max_adapters,
        exact_resume=True,
        prompt_logprobs=True,
        events=config.prefix_caching,
    )
    return BuiltEngine(EngineCore(scheduler, runner, options.clock, adapters), facts)


class Pace:
    """How long steps take."""

    def __init__(self, sim: SimConfig, options: SimOptions) -> None:
        self._sim = sim
        self._options = options

    def now(self) -> float:
        return self._options.clock()

    def wait(self, plan: Plan, started: float) -> None:
        """Sleeps until the step that began at `started` has taken its time."""
        num_decodes = sum(1 for item in plan.items if item.samples and item.num_tokens == 1)
        step_s = (
            self._sim.step_base_s
            + self._sim.step_per_sequence_s * len(plan.items)
            + (plan.num_tokens - num_decodes) / self._sim.prefill_tokens_per_s
        )
        left_s = started + step_s - self._options.clock()
        if left_s > 0:
            self._options.sleep(left_s)


class SimAdapters:
    """`max_adapters` slots. Reading an adapter takes `adapter_load_s` × rank / 8; a rank beyond `max_adapter_rank` does
    not fit."""

    def __init__(self, sim: SimConfig, sleep: Callable[[float], None]) -> None:
        self.num_loads = 0
        self._sim = sim
        self._sleep = sleep
        self._resident: OrderedDict[str, None] = OrderedDict()

    @property
    def resident(self) -> tuple[str, ...]:
        return tuple(self._resident)

    def read(self, adapter: AdapterSpec) -> Callable[[], None]:
        """See `replicas.engine.core.AdapterStore`."""
        if self._sim.max_adapters == 0:
            raise EngineError(f"this engine has no adapter slots: {adapter.adapter_id}")
        if adapter.rank > self._sim.max_adapter_rank:
            raise EngineError(f"rank {adapter.rank} of {adapter.adapter_id} is beyond {self._sim.max_adapter_rank}")
        self._sleep(self._sim.adapter_load_s * adapter.rank / _REFERENCE_RANK)
        return lambda: self._install(adapter.adapter_id)

    def unload(self, adapter_id: str) -> None:
        self._resident.pop(adapter_id, None)

    def use(self, adapter_ids: set[str]) -> None:
        """A step runs with these."""
        for adapter_id in sorted(adapter_ids):
            assert adapter_id in self._resident, f"{adapter_id} is in no slot"
            self._resident.move_to_end(adapter_id)

    def _install(self, adapter_id: str) -> None:
        if adapter_id not in self._resident:
            if len(self._resident) >= self._sim.max_adapters:
                raise EngineError(f"no slot is free for {adapter_id}: {self._sim.max_adapters} are taken")
            self._resident[adapter_id] = None
            self.num_loads += 1


class SimRunner:
    """Computes states through the block tables, samples, and lets the step's time pass.

    `kv[block_id * block_size + i]` is the state after the i-th token of the block.
    """

    def __init__(self, model: SimModel, pool: BlockPool, adapters: SimAdapters, pace: Pace) -> None:
        self.model = model
        self.block_size = pool.block_size
        self.kv = array("Q", bytes(8 * pool.num_blocks * pool.block_size))
        self._adapters = adapters
        self._pace = pace

    def execute(self, plan: Plan) -> StepResult:
        """See `replicas.engine.core.Runner`."""
        started = self._pace.now()
        adapters = {item.seq.request.adapter for item in plan.items} - {None}
        self._adapters.use({adapter for adapter in adapters if adapter is not None})
        for source, target in plan.copies:
            size = self.block_size
            self.kv[target * size : (target + 1) * size] = self.kv[source * size : (source + 1) * size]
        sampled: list[Sampled] = []
        prompt_logprobs: dict[str, tuple[TokenLogprob, ...]] = {}
        for item in plan.items:
            state = self._compute(item)
            seq = item.seq
            if item.samples:
                sampled.append(self.model.sample(state, seq.request.sampling, seq.num_output))
            if seq.request.sampling.prompt_logprobs is not None:
                prompt_logprobs[seq.request_id] = self._prompt_logprobs(item)
        self._pace.wait(plan, started)
        return StepResult(tuple(sampled), prompt_logprobs)

    def _compute(self, item: PlanItem) -> int:
        """Writes the states of the item's tokens; returns the last."""
        kv, size, table, tokens = self.kv, self.block_size, item.seq.block_ids, item.seq.tokens
        position, end = item.start, item.start + item.num_tokens
        state = root_state(item.seq.request.adapter) if position == 0 else self._state_at(item, position - 1)
        while position < end:
            in_block = position % size
            slot = table[position // size] * size + in_block
            stop = min(end, position - in_block + size)
            for token_id in tokens[position:stop]:
                state = ((state ^ token_id) * STEP) & MASK  # sim_model.next_state
                state ^= state >> 32
                kv[slot] = state
                slot += 1
            position = stop
        return state

    def _state_at(self, item: PlanItem, position: int) -> int:
        """The state after the token at `position`, read from the cache."""
        return self.kv[item.seq.block_ids[position // self.block_size] * self.block_size + position % self.block_size]

    def _prompt_logprobs(self, item: PlanItem) -> tuple[TokenLogprob, ...]:
        seq = item.seq
        num_top = seq.request.sampling.prompt_logprobs or 0
        last = min(item.start + item.num_tokens, seq.num_prompt - 1)
        return tuple(
            self.model.logprob(self._state_at(item, position), seq.tokens[position + 1], num_top)
            for position in range(item.start, last)
        )
