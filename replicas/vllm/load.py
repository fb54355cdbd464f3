"""A vLLM engine's load: what its scheduler counts each step, and what it does not say: prompts still to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from replicas.contract import EngineFacts, EngineStats, GenerateRequest
from replicas.engine.rates import Rates
from replicas.vllm.line import num_to_compute
from routing.waiting import merged

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.metrics.stats import SchedulerStats

MAX_POSITIONS = 32


@dataclass(frozen=True, slots=True)
class Step:
    """One step of vLLM's, as `Rates` looks at it."""

    num_prefill_tokens: int
    num_decodes: int


class VllmLoad:
    """`submitted`, `begun` and `ended` follow requests by vLLM's id, `observe` takes in what a step says of itself."""

    def __init__(self, facts: EngineFacts) -> None:
        self._facts = facts
        self._rates = Rates()
        self._waiting: dict[str, int] = {}  # prompts without an answer yet → tokens to compute
        self._num_open = 0
        self._num_running = 0
        self._usage = 0.0
        self._last_at: float | None = None  # end of the step before, while there was more to do
        self._num_steps = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._num_output_tokens = 0
        self._num_drafts = 0
        self._num_draft_tokens = 0
        self._accepted: list[int] = []

    @property
    def prefill_tokens_per_s(self) -> float:
        return self._rates.prefill_tokens_per_s

    @property
    def predicted_step_s(self) -> float:
        """Seconds that the step under way should take at most."""
        return self._rates.predict(min(sum(self._waiting.values()), self._facts.max_num_batched_tokens))

    def submitted(self, vllm_id: str, request: GenerateRequest) -> None:
        self._waiting[vllm_id] = num_to_compute(request)
        self._num_open += 1

    def begun(self, vllm_id: str, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """The first token, or whatever else came first."""
        if self._waiting.pop(vllm_id, None) is not None:
            self._num_prompt_tokens += num_prompt_tokens
            self._num_cached_tokens += num_cached_tokens

    def ended(self, vllm_id: str) -> None:
        self._waiting.pop(vllm_id, None)
        self._num_open -= 1

    def observe(self, outputs: EngineCoreOutputs) -> None:
        """Once per message of the engine core."""
        for output in outputs.outputs:
            self._num_output_tokens += len(output.new_token_ids)
            self._num_preemptions += sum(event.type.name == "PREEMPTED" for event in output.events or ())
        if outputs.scheduler_stats is not None:
            self._observe_step(outputs.scheduler_stats, outputs.timestamp)

    def stats(self) -> EngineStats:
        """As of the last step, with the requests submitted since counted as waiting."""
        num_blocks = self._facts.num_blocks
        num_running = min(self._num_running, self._num_open)
        sizes = self._waiting.values()
        return EngineStats(
            num_running=num_running,
            num_waiting=self._num_open - num_running,
            num_waiting_tokens=sum(sizes),
            waiting_sizes=merged((), sizes),
            num_free_blocks=round((1.0 - self._usage) * num_blocks),
            num_blocks=num_blocks,
            num_steps=self._num_steps,
            num_preemptions=self._num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_output_tokens=self._num_output_tokens,
            prefill_tokens_per_s=self._rates.prefill_tokens_per_s,
            step_time_s=self._rates.step_time_s,
            num_drafts=self._num_drafts,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=sum(self._accepted),
            num_accepted_by_position=tuple(self._accepted),
        )

    def _observe_step(self, stats: SchedulerStats, ended_at: float) -> None:
        self._num_steps += 1
        self._num_running = stats.num_running_reqs
        self._usage = stats.kv_cache_usage
        details = stats.iteration_details
        if details is not None and not details.is_dummy:
            # Between messages lies the whole of a step; what vLLM calls elapsed may be the wait for its result alone.
            elapsed_s = details.elapsed_ms / 1e3 if self._last_at is None else ended_at - self._last_at
            step = Step(details.num_ctx_tokens, details.num_generation_requests)
            if elapsed_s > 0 and (step.num_prefill_tokens or step.num_decodes):
                self._rates.observe(step, elapsed_s)
        self._last_at = ended_at if stats.num_running_reqs else None
        drafts = stats.spec_decoding_stats
        if drafts is not None:
            self._num_drafts += drafts.num_drafts
            self._num_draft_tokens += drafts.num_draft_tokens
            by_position = drafts.num_accepted_tokens_per_pos[:MAX_POSITIONS]
            self._accepted += [0] * (len(by_position) - len(self._accepted))
            for position, number in enumerate(by_position):
                self._accepted[position] += number
