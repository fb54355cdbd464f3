"""Usage of requests whose ingress vanished: nobody else can close their records."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one attempt used on this replica until it was cut off.

    `num_output_tokens` counts this attempt's tokens alone, delivered or not; `num_prior_tokens` came with the
    request from earlier attempts.
    """

    request_id: str
    attempt: int
    tenant: str
    replica_id: str
    ingress_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_prior_tokens: int
    reason: str
    adapter: str | None = None


Journal: TypeAlias = Callable[[Sequence[UsageRecord]], None]
"""Called once per vanished ingress, with a record for each of its open requests."""


class JsonLinesJournal:
    """Appends records to a file, one JSON object a line, with `at` (Unix seconds).

    The lines of one call go out in one write to an O_APPEND file of mode 0600, so that two processes never mix lines.
    """

    def __init__(self, path: Path, wall_clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._wall_clock = wall_clock

    def __call__(self, records: Sequence[UsageRecord]) -> None:
        at = round(self._wall_clock(), 3)
        lines = b"".join(
            msgspec.json.encode({"at": at, **msgspec.structs.asdict(record)}) + b"\n" for record in records
        )
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, lines)
        finally:
            os.close(descriptor)
