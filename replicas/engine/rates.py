"""How fast this engine is, learnt from its own steps."""

from __future__ import annotations

from typing import Protocol

_DECAY = 0.9
_MIN_PREFILL_SHARE = 0.1


class Computed(Protocol):
    """What a step did."""

    @property
    def num_prefill_tokens(self) -> int: ...

    @property
    def num_decodes(self) -> int: ...


class Rates:
    """Exponential means over steps: prompt tokens per second, and seconds a step with only decodes takes.

    The prefill rate is a quotient of two decayed sums, so a chunk counts by its size and a last chunk of three tokens
    cannot pull the mean down. In a mixed step the decodes' usual time is taken off first.
    """

    def __init__(self) -> None:
        self.step_time_s = 0.0
        self._tokens = 0.0
        self._seconds = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """0 while no prompt has been computed yet."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0

    def observe(self, plan: Computed, elapsed_s: float) -> None:
        """Learns from one executed step that took `elapsed_s` seconds."""
        num_prefill = plan.num_prefill_tokens
        if num_prefill == 0:
            mean = self.step_time_s
            self.step_time_s = elapsed_s if mean == 0.0 else _DECAY * mean + (1 - _DECAY) * elapsed_s
            return
        decode_s = self.step_time_s if plan.num_decodes else 0.0
        self._tokens = _DECAY * self._tokens + num_prefill
        self._seconds = _DECAY * self._seconds + max(elapsed_s - decode_s, _MIN_PREFILL_SHARE * elapsed_s)

    def predict(self, num_prefill_tokens: int) -> float:
        """Seconds a step of that many prompt tokens beside the usual decodes should take."""
        rate = self.prefill_tokens_per_s
        return self.step_time_s + (num_prefill_tokens / rate if rate > 0 else 0.0)
