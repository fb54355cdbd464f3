"""The engine without threads: guess, plan, execute, commit. The native and the sim engine differ in their `Runner` and
in who guesses, nothing else.

add/abort ─► Speculator.draft() ─► Scheduler.plan(drafts) ─► Runner.execute(plan) ─► Scheduler.commit(plan, result) ─►
[StepDelta]
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from replicas.contract import AdapterSpec, EngineError, EngineStats, Fault, GenerateRequest, KvEvent, StepDelta
from replicas.engine.rates import Rates
from replicas.engine.scheduler import NO_GUESSES, Scheduler
from replicas.engine.sequence import Plan, StepResult
from replicas.engine.speculative.speculator import SpeculationStats, Speculator
from replicas.engine.structured.grammar import Grammar

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """The model. Called from one thread only."""

    def execute(self, plan: Plan) -> StepResult:
        """Makes `plan.copies` first (whole KV blocks), then computes every item and samples where `item.samples`.

        Writes the KV of tokens `[start, start + num_tokens)` through `item.seq.block_ids` (read anew each step: a
        table may change between steps), and returns the new tokens of each sampling item, in the items' order: a token
        drawn at its last known one, and while that confirms a draft, the next. The plan is never empty. Any exception
        is taken as the engine's death.
        """
        ...


class AdapterStore(Protocol):
    """Runners that can apply LoRA adapters have one: a fixed number of slots, filled and emptied as told."""

    @property
    def resident(self) -> tuple[str, ...]:
        """Ids of the adapters that a step can use, least recently used first. On the engine's thread, like the rest."""
        ...

    def read(self, adapter: AdapterSpec) -> Callable[[], None]:
        """The slow part of a load, on any thread, beside steps and other loads.

        Returns what puts the adapter into a free slot, to be called between two steps; that raises EngineError when no
        slot is free. Raises EngineError when the adapter cannot be read or does not fit this engine.
        """
        ...

    def unload(self, adapter_id: str) -> None:
        """Empties the adapter's slot; no-op when it has none."""
        ...


class EngineCore:
    """Synchronous engine: no threads, no sleeping, the clock passed in (seconds, monotonic)."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        clock: Callable[[], float],
        adapters: AdapterStore | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.adapters = adapters
        self.speculator = speculator
        self.dead: Fault | None = None
        self._clock = clock
        self._rates = Rates()
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to compute or to deliver."""
        return self.scheduler.has_work

    def add(self, request: GenerateRequest, grammar: Grammar | None = None) -> None:
        """Accepts a request, with the grammar it asks for: exactly one terminal delta follows. Raises RefusedError,
        then none does."""
        self.scheduler.add(request, grammar)

    def abort(self, request_id: str) -> None:
        """Frees the request's blocks now; its terminal delta comes with the next step. No-op when finished."""
        self.scheduler.abort(request_id)

    def step(self) -> list[StepDelta]:
        """One step: everything that became known. A runner's exception ends every open request and the engine."""
        started = self._clock()
        try:
            plan = self.scheduler.plan(
                self.speculator.draft(self.scheduler.decoding) if self.speculator else NO_GUESSES
            )
            result = self.runner.execute(plan) if plan.items else StepResult(())
            deltas = self.scheduler.commit(plan, result)
        except Exception as error:
            logger.exception("engine step failed")
            return self.die(f"{type(error).__name__}: {error}")
        if plan.items:
            self._learn(plan, result, self._clock() - started)
        return deltas

    def _learn(self, plan: Plan, result: StepResult, elapsed_s: float) -> None:
        self._num_steps += 1
        self.scheduler.stall_limit.observe(plan, elapsed_s)
        self._rates.observe(plan, elapsed_s)
        self.scheduler.ranking.prefill_tokens_per_s = self._rates.prefill_tokens_per_s
        if self.speculator is not None:
            self.speculator.observe(plan, result, elapsed_s)

    def load_adapter(self, adapter: AdapterSpec) -> None:
        """Makes an adapter usable. Raises EngineError when this engine has none, or cannot load it."""
        self.read_adapter(adapter)()

    def read_adapter(self, adapter: AdapterSpec) -> Callable[[], None]:
        """See `AdapterStore.read`."""
        if self.adapters is None:
            raise EngineError(f"this engine has no adapters: {adapter.adapter_id}")
        return self.adapters.read(adapter)

    def unload_adapter(self, adapter_id: str) -> None:
        """Empties an adapter's slot. Raises EngineError while requests use it."""
        if self.adapters is None:
            return
        num_open = self.scheduler.num_open_with(adapter_id)
        if num_open:
            raise EngineError(f"adapter {adapter_id} is in use: {num_open=}")
        self.adapters.unload(adapter_id)

    def die(self, reason: str) -> list[StepDelta]:
        """Marks the engine dead and ends every open request with `engine_dead`."""
        self.dead = Fault("engine_dead", f"the engine stopped: {reason}", retryable=True)
        return self.scheduler.fail(self.dead)

    def predicted_step_s(self) -> float:
        """How long a full step should take by the learnt rates; 0 while nothing is known."""
        return self._rates.predict(self.scheduler.config.max_num_batched_tokens)

    def stats(self) -> EngineStats:
        """The load now."""
        scheduler = self.scheduler
        guessed = self.speculator.stats if self.speculator else SpeculationStats()
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            waiting_sizes=scheduler.waiting_sizes,
            num_free_blocks=scheduler.pool.num_free,
            num_blocks=scheduler.pool.num_blocks,
            num_steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_output_tokens=scheduler.num_output_tokens,
            prefill_tokens_per_s=self._rates.prefill_tokens_per_s,
            step_time_s=self._rates.step_time_s,
            adapters=self.adapters.resident if self.adapters else (),
            kv_seq=scheduler.pool.next_seq,
            num_drafts=guessed.num_drafts,
            num_draft_tokens=guessed.num_draft_tokens,
            num_accepted_tokens=guessed.num_accepted_tokens,
            num_accepted_by_position=guessed.num_accepted_by_position,
        )

    def kv_events(self) -> list[KvEvent]:
        """What entered and left the prefix cache since the last call, in order."""
        return self.scheduler.pool.take_events()
