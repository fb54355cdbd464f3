"""Runs as a made-up engine would have them: a candidate serves up to its capacity in time, and nothing beyond."""

from __future__ import annotations

from collections.abc import Callable

from ops.bench.load_spec import Timing
from ops.tune.capacity import Capacity, Grid, capacity
from ops.tune.errors import TrialError
from ops.tune.findings import Rate, Run, Values
from ops.tune.search import Outcome
from ops.tune.workload import Slo

SLO = Slo(ttft_s=1.0, tpot_s=0.1, share=0.95)
NUM_REQUESTS = 20


def made_run(values: Values, rate: Rate, capacity_per_s: float, saturation_per_s: float) -> Run:
    """`ttft` grows with the rate, from half the SLO at nothing to the SLO at the capacity; beyond it all are late."""
    late = rate is not None and rate > capacity_per_s
    ttft_s = 5.0 if late else 0.5 + 0.5 * ((rate or 0.0) / capacity_per_s)
    return Run(
        situation="made up",
        engine="made up",
        values=dict(values),
        rate=rate,
        wall_s=NUM_REQUESTS / (saturation_per_s if rate is None else rate),
        num_output_tokens=NUM_REQUESTS * 8,
        num_prompt_tokens=NUM_REQUESTS * 16,
        num_cached_tokens=0,
        num_rejected=0,
        timings=(Timing(ttft_s, 0.05),) * NUM_REQUESTS,
    )


class MadeUp:
    """`capacity_of` says how many requests a second a candidate serves in time; it may raise TrialError."""

    def __init__(self, capacity_of: Callable[[Values], float], headroom: float = 1.5) -> None:
        self.capacity_of = capacity_of
        self.headroom = headroom
        self.runs: list[tuple[Values, Rate]] = []

    async def measured(self, values: Values, to_beat: int | None = None) -> Capacity:
        able = self.capacity_of(values)

        async def measure(rate: Rate) -> Run:
            assert (values, rate) not in self.runs, "nothing is measured twice"
            self.runs.append((values, rate))
            return made_run(values, rate, able, able * self.headroom)

        return await capacity(measure, SLO, Grid(), to_beat)

    async def evaluate(self, values: Values, to_beat: int | None) -> Outcome:
        try:
            return Outcome(values, await self.measured(values, to_beat))
        except TrialError as error:
            return Outcome(values, reason=str(error))
