"""What a replica still has to prefill, by size, and how fast it goes: what it tells the ingress."""

from __future__ import annotations

from replicas.engine.order import Pace
from routing.ageing import PromptScale

_DECAY = 0.9
_MIN_PREFILL_SHARE = 0.1


class PendingSizes:
    """Numbers and tokens of waiting prompts in power-of-two buckets, kept up to date in O(1)."""

    __slots__ = ("num", "num_tokens", "tokens", "total")

    def __init__(self) -> None:
        self.num: list[int] = []
        self.tokens: list[int] = []
        self.total = 0
        self.num_tokens = 0

    def add(self, size: int, sign: int = 1) -> None:
        """One prompt of `size` tokens more (or, with sign -1, less)."""
        bucket = size.bit_length() - 1
        while len(self.num) <= bucket:
            self.num.append(0)
            self.tokens.append(0)
        self.num[bucket] += sign
        self.tokens[bucket] += sign * size
        self.total += sign
        self.num_tokens += sign * size


class LearntRates:
    """`replicas.engine.rates` in closed form: what an engine learns from many equal steps at once."""

    __slots__ = ("_scale", "_seconds", "_tokens", "step_time_s")

    def __init__(self) -> None:
        self.step_time_s = 0.0
        self._tokens = 0.0
        self._seconds = 0.0
        self._scale = PromptScale()

    @property
    def pace(self) -> Pace:
        """What an order may know."""
        return Pace(self.prefill_tokens_per_s, self._scale.tokens)

    def arrived(self, num_uncached: int) -> None:
        """A prompt came, with so many tokens to compute."""
        self._scale.observe(num_uncached)

    @property
    def prefill_tokens_per_s(self) -> float:
        """0 while no prompt has been computed yet."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0

    def observe(self, steps: tuple[int, float], num_prefill: int, num_decodes: int) -> None:
        """Learns from (number, seconds each) of equal steps with so many prompt tokens and decodes in each."""
        num_steps, step_s = steps
        decay = _DECAY**num_steps
        if num_prefill == 0:
            mean = self.step_time_s
            self.step_time_s = step_s + (mean - step_s) * decay if mean else step_s
            return
        decode_s = self.step_time_s if num_decodes else 0.0
        weight = (1 - decay) / (1 - _DECAY)
        self._tokens = decay * self._tokens + weight * num_prefill
        self._seconds = decay * self._seconds + weight * max(step_s - decode_s, _MIN_PREFILL_SHARE * step_s)
