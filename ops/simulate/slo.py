"""Which answers came in time.

A request is in time when its first token comes within max(`floor_s`, `factor` × the seconds its whole prompt would take
alone, with nothing cached): a target that does not depend on who routes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ops.simulate.calibration import Calibration
from ops.simulate.trace import TraceRequest


@dataclass(frozen=True, slots=True)
class Slo:
    """A load is sustained when `attainment` of all requests are in time."""

    floor_s: float = 1.0
    factor: float = 2.0
    attainment: float = 0.95

    def target_s(self, request: TraceRequest, calibration: Calibration) -> float:
        """Seconds to the first token that count as in time."""
        return max(self.floor_s, self.factor * request.num_prompt / calibration.prefill_tokens_per_s)
