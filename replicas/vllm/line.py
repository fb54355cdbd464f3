"""The order of prefills in vLLM: ours, told through its priorities, which it reads once, when a request comes."""

from __future__ import annotations

from replicas.contract import GenerateRequest
from replicas.engine.order import ORDERS, TICK_S, OrderName, Pace
from routing.ageing import PromptScale


class Line:
    """Says when each request is due. What the cache holds by the time it runs is not known here, only what its sender
    believed."""

    def __init__(self, order: OrderName) -> None:
        self._due = ORDERS[order]
        self._scale = PromptScale()

    def place(self, request: GenerateRequest, now_s: float, prefill_tokens_per_s: float) -> tuple[int, float]:
        """(priority, tie-break): the smaller goes first, in vLLM as here."""
        num_uncached = num_to_compute(request)
        self._scale.observe(num_uncached)
        due = self._due(request, now_s, num_uncached, Pace(prefill_tokens_per_s, self._scale.tokens))
        return int(due // TICK_S), request.fair_tag


def num_to_compute(request: GenerateRequest) -> int:
    """Tokens of a request that no cache holds, as far as anybody knows before it runs."""
    num_new = request.num_prompt_tokens if request.num_uncached is None else request.num_uncached
    return min(num_new, request.num_prompt_tokens) + len(request.produced) // 4
