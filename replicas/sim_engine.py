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
from replicas.engine.sequence import Plan, PlanItem, Sampled, SamplePoint, Sequence, StepResult
from replicas.engine.speculative.setup import MODEL_METHODS, speculator, without_model
from replicas.engine.speculative.speculator import Speculator
from replicas.engine.structured.store import make_grammars
from replicas.sim_drafter import SimDrafter
from replicas.sim_model import MASK, STEP, SimModel, next_state, root_state

PRINTABLE_ASCII = tuple(range(0x20, 0x7F))
"""What `sim:bytes` shows as text: its ids below 256 are bytes."""

_REFERENCE_RANK = 8


@dataclass(frozen=True, slots=True)
class SimOptions:
    """What tests replace: the ids the model speaks in, the clock (seconds, monotonic) and how time passes.

    `tokenizer_json`: the model's tokenizer; without it answers cannot follow grammars.
    """

    alphabet: tuple[int, ...] = PRINTABLE_ASCII
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    tokenizer_json: str | None = None


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
    grammars = make_grammars(config, options.tokenizer_json, model.vocab_size, model.eos_token_ids)
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
        max_adapter_rank=sim.max_adapter_rank if sim.max_adapters else 0,
        adapter_pool_ranks=sim.max_adapters * sim.max_adapter_rank,
        exact_resume=True,
        structured=grammars is not None,
        prompt_logprobs=True,
        events=config.prefix_caching,
        speculative=config.speculative.method if config.speculative else "",
    )
    core = EngineCore(scheduler, runner, options.clock, adapters, _speculator(config, runner))
    return BuiltEngine(core, facts, grammars)


def _speculator(config: EngineConfig, runner: SimRunner) -> Speculator | None:
    """Methods that look at tokens alone are the real ones; a model's guesses are pretended."""
    if config.speculative is None:
        return None
    if config.speculative.method not in MODEL_METHODS:
        return speculator(config.speculative, without_model(config.speculative))
    return speculator(config.speculative, SimDrafter(runner.model, config.sim.draft_acceptance, runner.state_of))


class Pace:
    """How long steps take."""

    def __init__(self, sim: SimConfig, options: SimOptions) -> None:
        self._sim = sim
        self._options = options

    def now(self) -> float:
        return self._options.clock()

    def wait(self, plan: Plan, started: float) -> None:
        """Sleeps until the step that began at `started` has taken its time."""
        num_drafts = sum(len(item.drafts) for item in plan.items)
        step_s = (
            self._sim.step_base_s
            + self._sim.step_per_sequence_s * len(plan.items)
            + self._sim.step_per_draft_s * num_drafts
            + plan.num_prefill_tokens / self._sim.prefill_tokens_per_s
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
        sampled: list[tuple[Sampled, ...]] = []
        draws: dict[str, tuple[int, ...]] = {}
        prompt_logprobs: dict[str, tuple[TokenLogprob, ...]] = {}
        for item in plan.items:
            seq = item.seq
            self._compute(item)
            if item.samples:
                drawn = self._draw(item)
                draws[seq.request_id] = tuple(token.token_id for token in drawn)
                sampled.append(tuple(drawn[row] for row in self._keep(item, draws[seq.request_id])))
            if seq.request.sampling.prompt_logprobs is not None:
                prompt_logprobs[seq.request_id] = self._prompt_logprobs(item)
        self._pace.wait(plan, started)
        return StepResult(tuple(sampled), prompt_logprobs, draws)

    def state_of(self, seq: Sequence) -> int:
        """The state after all tokens of a sequence of which only the last is not computed."""
        last = seq.num_tokens - 1
        before = root_state(seq.request.adapter) if last == 0 else self.kv[self._slot(seq, last - 1)]
        return next_state(before, seq.tokens[last])

    def _draw(self, item: PlanItem) -> list[Sampled]:
        """The tokens drawn at the last known one and at every draft."""
        last, sampling = item.start + item.num_known - 1, item.seq.request.sampling
        return [
            self.model.sample(self._state_at(item, last + row), sampling, point.num_output, self._allowed(point))
            for row, point in enumerate(item.points)
        ]

    def _allowed(self, point: SamplePoint) -> list[int] | None:
        """What the grammar of a constrained sequence lets the model say: of its alphabet and to end the answer, or, if
        there is none of that, anything. An answer that is complete may end before `min_tokens`."""
        grammar, eos = point.seq.grammar, self.model.eos_token_ids
        mask = None if grammar is None else grammar.allowed(point.path)
        if mask is None:
            return None
        own = [t for t in (*self.model.alphabet, *eos) if mask[t >> 3] >> (t & 7) & 1]
        allowed = own or [t for t in range(self.model.vocab_size) if mask[t >> 3] >> (t & 7) & 1]
        banned = point.banned(eos)
        return [t for t in allowed if t not in banned] or allowed

    def _keep(self, item: PlanItem, draws: tuple[int, ...]) -> tuple[int, ...]:
        """Moves the states of the confirmed drafts to their places behind one another; row 0 and theirs."""
        last, rows = item.start + item.num_known - 1, item.drafts.accepted(draws)
        for depth, row in enumerate(rows, 1):
            self.kv[self._slot(item.seq, last + depth)] = self._state_at(item, last + row)
        return 0, *rows

    def _compute(self, item: PlanItem) -> None:
        """Writes the states of the item's tokens, then those of its drafts, each from its parent's."""
        self._compute_known(item)
        last = item.start + item.num_known - 1
        for row, (token_id, parent) in enumerate(zip(item.drafts.token_ids, item.drafts.parents, strict=True), 1):
            self.kv[self._slot(item.seq, last + row)] = next_state(self._state_at(item, last + parent), token_id)

    def _compute_known(self, item: PlanItem) -> None:
        kv, size, table, tokens = self.kv, self.block_size, item.seq.block_ids, item.seq.tokens
        position, end = item.start, item.start + item.num_known
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

    def _state_at(self, item: PlanItem, position: int) -> int:
        """The state after the token in a slot, which is its position but for drafts; read from the cache."""
        return self.kv[self._slot(item.seq, position)]

    def _slot(self, seq: Sequence, position: int) -> int:
        return seq.block_ids[position // self.block_size] * self.block_size + position % self.block_size

    def _prompt_logprobs(self, item: PlanItem) -> tuple[TokenLogprob, ...]:
        seq = item.seq
        num_top = seq.request.sampling.prompt_logprobs or 0
        last = min(item.start + item.num_tokens, seq.num_prompt - 1)
        return tuple(
            self.model.logprob(self._state_at(item, position), seq.tokens[position + 1], num_top)
            for position in range(item.start, last)
        )
