from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway import ledger as ledger_module
from gateway.ledger import Ledger, UsageRecord
from ops.metrics import Metrics


def record(number: int = 0) -> UsageRecord:
    return UsageRecord(
        time=1.0, request_id=f"r-{number}", client_request_id=None, tenant="t", model="m", route="chat.completions",
        stream=True, outcome="ok", status=200, code=None, user=None, num_choices=1, num_prompt_tokens=7,
        num_cached_tokens=3, num_completion_tokens=5, ttft_s=0.1, duration_s=0.5, inter_token_s=0.1,
    )  # fmt: skip


async def test_every_record_is_a_json_line_once_the_ledger_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "usage.jsonl"
    ledger = Ledger(Metrics(), path)
    ledger.start()
    for number in range(500):
        ledger.record(record(number))
    await ledger.close()
    await ledger.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["request_id"] for line in lines] == [f"r-{number}" for number in range(500)]
    assert lines[0]["num_cached_tokens"] == 3


async def test_records_are_counted_without_a_log() -> None:
    metrics = Metrics()
    ledger = Ledger(metrics)
    ledger.start()
    ledger.record(record())
    await ledger.close()
    text = metrics.exposition().decode()
    assert 'warmgate_requests_total{model="m",route="chat.completions",status="200"} 1.0' in text
    assert 'warmgate_tokens_total{kind="cached",model="m",tenant="t"} 3.0' in text
    assert 'warmgate_ttft_seconds_count{model="m"} 1.0' in text


async def test_a_log_that_cannot_take_more_drops_records_and_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_QUEUED_RECORDS", 3)
    metrics = Metrics()
    ledger = Ledger(metrics, tmp_path / "usage.jsonl")
    monkeypatch.setattr(ledger, "_write_all", lambda: None)  # a writer that never comes to writing
    ledger.start()
    for number in range(5):
        ledger.record(record(number))
    assert "warmgate_usage_records_dropped_total 2.0" in metrics.exposition().decode()
    assert "warmgate_usage_records_total 5.0" in metrics.exposition().decode()


def test_a_log_that_cannot_be_opened_is_known_at_start(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        Ledger(Metrics(), tmp_path).start()
