"""What a simulated replica pushes with each step, made only when somebody looks."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from replicas.contract import EngineStats
from routing.waiting import Sizes

BLOCK_TOKENS = 16
"""In which a replica tells its KV memory, as engines do; the simulation itself counts tokens."""


@dataclass(slots=True)
class Steps:
    """Equal steps under way: the first begins at `begin`; `num_before` steps had ended then.

    In each, one prompt of `head_left` tokens has `head_tokens` of them computed; 0 when none goes on for several steps.
    """

    begin: float = 0.0
    step_s: float = inf
    num: int = 0
    num_before: int = 0
    head_left: int = 0
    head_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AdapterState:
    """What it tells of its LoRA slots (see `replicas.contract.EngineStats`)."""

    resident: tuple[str, ...] = ()
    loading: tuple[tuple[str, float], ...] = ()
    num_waiting: int = 0
    load_s: float = 0.0
    queue_s: float = 0.0


_NO_ADAPTERS = AdapterState()


@dataclass(slots=True, eq=False)
class Frame:
    """A replica's state from the end of a step (`since`) on. `others`: prompts partly computed beside the head's.

    `waiting`: (numbers, tokens) by power-of-two bucket of prompts not begun; the rest as in `EngineStats`.
    """

    since: float
    steps: Steps
    waiting: tuple[list[int], list[int]]
    others: list[int]
    num_running: int
    num_free_tokens: int
    num_tokens: int
    rates: tuple[float, float]
    adapters: AdapterState = _NO_ADAPTERS
    _made: EngineStats | None = None
    _made_after: int = -1

    def stats(self, at: float) -> EngineStats:
        """What was pushed last by then; the same object while nothing new was."""
        steps = self.steps
        done = min(steps.num, int((at - steps.begin) / steps.step_s + 1e-9)) if steps.num else 0
        if self._made is None or done != self._made_after:
            self._made_after = done
            self._made = self._make(done)
        return self._made

    def _make(self, done: int) -> EngineStats:
        steps = self.steps
        prefilling = list(self.others)
        if steps.head_left > done * steps.head_tokens:
            prefilling.append(steps.head_left - done * steps.head_tokens)
        num_waiting = sum(self.waiting[0])
        return EngineStats(
            num_running=self.num_running,
            num_waiting=num_waiting,
            num_waiting_tokens=sum(self.waiting[1]) + sum(prefilling),
            num_free_blocks=self.num_free_tokens // BLOCK_TOKENS,
            num_blocks=self.num_tokens // BLOCK_TOKENS,
            num_steps=steps.num_before + done,
            prefill_tokens_per_s=self.rates[0],
            step_time_s=self.rates[1],
            waiting_sizes=_histogram(self.waiting, prefilling),
            adapters=self.adapters.resident,
            loading=self.adapters.loading,
            num_waiting_adapter=self.adapters.num_waiting,
            adapter_load_s=self.adapters.load_s,
            adapter_queue_s=self.adapters.queue_s,
        )


def _histogram(waiting: tuple[list[int], list[int]], prefilling: list[int]) -> Sizes:
    """The waiting ones' histogram with partly computed prompts added, trailing empty buckets left out."""
    num, tokens = waiting
    if prefilling:
        num, tokens = num.copy(), tokens.copy()
        for size in prefilling:
            bucket = size.bit_length() - 1
            missing = bucket + 1 - len(num)
            if missing > 0:
                num += [0] * missing
                tokens += [0] * missing
            num[bucket] += 1
            tokens[bucket] += size
    length = len(num)
    while length and not num[length - 1]:
        length -= 1
    return tuple(zip(num[:length], tokens[:length], strict=True))
