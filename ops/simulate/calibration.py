"""What a step of a replica costs, and the file that a live measurement leaves.

A step takes step_base_s + step_per_sequence_s × sequences in it + prompt tokens in it ÷ prefill_tokens_per_s.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ops.simulate.errors import SimulationError


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Step costs in seconds. The defaults are round figures for one GPU and an 8B model.

    `adapter_load_s`: fetching one adapter into a slot. `overhead_s`: what a client waits for a first token beside the
    replica's steps (HTTP, tokenising, the way there and back). `source` says what was measured, and when.
    """

    prefill_tokens_per_s: float = 8000.0
    step_base_s: float = 0.006
    step_per_sequence_s: float = 0.00035
    adapter_load_s: float = 0.2
    overhead_s: float = 0.0
    source: str = "defaults"

    def __post_init__(self) -> None:
        positive = (self.prefill_tokens_per_s, self.step_base_s)
        others = (self.step_per_sequence_s, self.adapter_load_s, self.overhead_s)
        if not all(0 < x < float("inf") for x in positive) or min(*others) < 0:
            raise ValueError("rates and step times must be positive and finite")

    def step_s(self, num_sequences: int, num_prefill_tokens: int) -> float:
        """Seconds of one step."""
        return (
            self.step_base_s + self.step_per_sequence_s * num_sequences + num_prefill_tokens / self.prefill_tokens_per_s
        )


def load_calibration(path: Path) -> Calibration:
    """Reads a calibration file; raises SimulationError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Calibration)
    except (OSError, msgspec.DecodeError) as error:
        raise SimulationError(f"{path}: {error}") from error


def save_calibration(path: Path, calibration: Calibration) -> None:
    """Writes a calibration file; raises SimulationError."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(calibration)) + b"\n")
    except OSError as error:
        raise SimulationError(f"{path}: {error}") from error
