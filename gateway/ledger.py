"""Exactly one usage record per generation request, whatever became of it: answered, failed, refused, client gone.

Making a record never waits for the disk: lines go to a bounded queue that a writer thread empties. A queue that is full
(a disk that hangs) drops records and counts them.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from ops.metrics import Metrics, RequestObserved

logger = logging.getLogger("warmgate.ledger")

MAX_QUEUED_RECORDS = 100_000

Outcome: TypeAlias = Literal["ok", "error", "refused", "cancelled"]
"""refused: an error before anything was generated; error: the answer broke off; cancelled: the client went away."""


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one HTTP request used. `time` is Unix seconds at arrival; `status` is HTTP's, 499 when the client left.

    `num_prompt_tokens` counts each prompt once however many choices it had; `num_completion_tokens` counts all that
    was generated, choices that were not returned (best_of) included. `model`: of an adapter (`name@version`) its base.
    `adapter_wait_s`: how long it waited for that adapter to be loaded.
    """

    time: float
    request_id: str
    client_request_id: str | None
    tenant: str
    model: str
    route: str
    stream: bool
    outcome: Outcome
    status: int
    code: str | None
    user: str | None
    num_choices: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    ttft_s: float | None
    duration_s: float
    inter_token_s: float | None
    adapter: str | None = None
    adapter_wait_s: float = 0.0


class Ledger:
    """Takes usage records: counts them, and writes each as a JSON line to `path` when there is one."""

    def __init__(self, metrics: Metrics, path: Path | None = None) -> None:
        self._metrics = metrics
        self._path = path
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_QUEUED_RECORDS)
        self._encode = msgspec.json.Encoder().encode
        self._writer: threading.Thread | None = None

    def start(self) -> None:
        """Opens the log and starts its writer; raises OSError when the log cannot be opened."""
        if self._path is None or self._writer is not None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.open("ab").close()
        self._writer = threading.Thread(target=self._write_all, name="usage-log", daemon=True)
        self._writer.start()

    def record(self, record: UsageRecord) -> None:
        """Counts a record and hands it to the writer. Never blocks."""
        self._metrics.usage_records.inc()
        self._metrics.observe(
            RequestObserved(
                route=record.route,
                model=record.model,
                tenant=record.tenant,
                status=record.status,
                e2e_s=record.duration_s,
                ttft_s=record.ttft_s,
                inter_token_s=record.inter_token_s,
                num_prompt_tokens=record.num_prompt_tokens,
                num_cached_tokens=record.num_cached_tokens,
                num_completion_tokens=record.num_completion_tokens,
                adapter_wait_s=record.adapter_wait_s,
            )
        )
        if self._writer is not None:
            try:
                self._lines.put_nowait(self._encode(record))
            except queue.Full:
                self._metrics.usage_records_dropped.inc()

    async def close(self) -> None:
        """Returns when every record taken so far is in the log."""
        writer, self._writer = self._writer, None
        if writer is not None:
            await asyncio.to_thread(self._lines.put, None)
            await asyncio.to_thread(writer.join)

    def _write_all(self) -> None:
        assert self._path is not None
        while True:
            lines, ended = self._take_waiting()
            try:
                with self._path.open("ab") as log:
                    log.write(b"".join(line + b"\n" for line in lines))
            except OSError as error:
                self._metrics.usage_records_dropped.inc(len(lines))
                logger.error("usage log %s: %s", self._path, error)
            if ended:
                return

    def _take_waiting(self) -> tuple[list[bytes], bool]:
        """Waits for a record, then takes what is there; True when the ledger was closed."""
        lines: list[bytes] = []
        line = self._lines.get()
        while line is not None:
            lines.append(line)
            try:
                line = self._lines.get_nowait()
            except queue.Empty:
                return lines, False
        return lines, True
