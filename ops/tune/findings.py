"""What was measured, a JSON line each, as soon as it is known: a second call reads it and goes on from there."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, TypeAlias

import msgspec

from ops.bench.load_spec import Quantiles, Timing
from ops.tune.errors import TuneError
from ops.tune.workload import Slo

Value: TypeAlias = int | float | None
"""Of a knob; None where it is off."""

Values: TypeAlias = Mapping[str, Value]
"""A candidate: every knob of its engine with a value."""

Rate: TypeAlias = float | None
"""Requests sent a second; None: all at once, which finds what the replicas do at most."""


class Run(msgspec.Struct, frozen=True, kw_only=True, tag="run"):
    """One candidate under one load. `situation`: a digest of all that matters besides. Token counts are what the
    replicas' usage said. `repeat`: how often the same was measured before."""

    situation: str
    engine: str
    values: dict[str, Value]
    rate: Rate
    wall_s: float
    num_output_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_rejected: int
    timings: tuple[Timing | None, ...]
    repeat: int = 0

    @property
    def num_ok(self) -> int:
        return sum(timing is not None for timing in self.timings)

    @property
    def requests_per_s(self) -> float:
        return self.num_ok / self.wall_s

    @property
    def output_tokens_per_s(self) -> float:
        return self.num_output_tokens / self.wall_s

    @property
    def ttft(self) -> Quantiles:
        return Quantiles.of([math.inf if timing is None else timing.ttft_s for timing in self.timings])

    @property
    def tpot(self) -> Quantiles:
        return Quantiles.of([math.inf if timing is None else timing.tpot_s for timing in self.timings])

    @property
    def mean_under_way(self) -> float:
        """Requests under way at once, on average over the run."""
        a_request = max(0.0, self.num_output_tokens / max(1, self.num_ok) - 1)
        return sum(t.ttft_s + a_request * t.tpot_s for t in self.timings if t is not None) / self.wall_s

    def share_in_time(self, slo: Slo) -> float:
        return sum(slo.in_time(timing) for timing in self.timings) / len(self.timings)

    def meets(self, slo: Slo) -> bool:
        return self.share_in_time(slo) >= slo.share


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag="failure"):
    """A candidate that could not be measured, and why."""

    situation: str
    engine: str
    values: dict[str, Value]
    reason: str


Finding: TypeAlias = Run | Failure

_DECODER = msgspec.json.Decoder(Finding)


def key_of(values: Values) -> str:
    """The same for the same candidate, however its numbers were written."""
    return ",".join(f"{name}={in_plain(values[name])}" for name in sorted(values))


def in_plain(value: Value) -> str:
    """A value as a person writes it."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


class Findings:
    """The findings of one folder. `retry`: failures of earlier calls do not count."""

    def __init__(self, path: Path, *, retry: bool = False) -> None:
        self._path = path
        self._runs: dict[tuple[str, str, Rate, int], Run] = {}
        self._failures: dict[tuple[str, str], Failure] = {}
        self.num_found = 0
        for line in self._lines():
            with contextlib.suppress(msgspec.MsgspecError):  # a line that was cut off when the machine went down
                self._note(_DECODER.decode(line))
                self.num_found += 1
        if retry:
            self._failures.clear()

    def run(self, situation: str, values: Values, rate: Rate, repeat: int = 0) -> Run | None:
        return self._runs.get((situation, key_of(values), rate, repeat))

    def failure(self, situation: str, values: Values) -> Failure | None:
        return self._failures.get((situation, key_of(values)))

    def add(self, finding: Finding) -> None:
        """Remembers it, in the file first. Raises TuneError where that cannot be written."""
        try:
            with self._path.open("a+b") as file:
                file.write((b"" if _is_whole(file) else b"\n") + msgspec.json.encode(finding) + b"\n")
        except OSError as error:
            raise TuneError(f"{self._path}: {error}") from error
        self._note(finding)

    def _note(self, finding: Finding) -> None:
        place = (finding.situation, key_of(finding.values))
        if isinstance(finding, Failure):
            self._failures[place] = finding
        else:
            self._runs[(*place, finding.rate, finding.repeat)] = finding

    def _lines(self) -> list[bytes]:
        try:
            return self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise TuneError(f"{self._path}: {error}") from error


def _is_whole(file: BinaryIO) -> bool:
    """Whether the last line was written to its end."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
