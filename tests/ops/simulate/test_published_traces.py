"""Figures of published traces, where they are: WARMGATE_TRACES names the folder (docs/simulate.md says whence)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ops.simulate.bounds import infinite_cache_hit, pooled_lru_hit
from ops.simulate.driver import run
from ops.simulate.fleet import FleetSpec
from ops.simulate.formats import load_trace
from ops.simulate.replica import ReplicaSpec


def published(name: str) -> Path:
    folder = os.environ.get("WARMGATE_TRACES")
    if folder is None:
        pytest.skip("WARMGATE_TRACES names no folder with published traces")
    path = Path(folder) / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mooncake_conversation_first_half.jsonl", 0.352), ("mooncake_synthetic_first_half.jsonl", 0.3375)],
)
def test_the_halves_of_mooncake_hit_an_infinite_cache_as_computed_elsewhere(name: str, expected: float) -> None:
    trace = load_trace(published(name))
    assert infinite_cache_hit(trace.requests, trace.block_tokens) == pytest.approx(expected, abs=0.0001)


def test_within_sessions_nearly_every_token_was_there_before() -> None:
    trace = load_trace(published("agentic_sessions_even.jsonl.gz"))
    assert infinite_cache_hit(trace.requests, trace.block_tokens) == pytest.approx(0.963, abs=0.001)


@pytest.mark.parametrize("kv_tokens", [512_000, 4_000_000])
def test_a_fleet_hits_at_most_what_one_pooled_cache_does_and_an_affine_policy_nearly_that(kv_tokens: int) -> None:
    trace = load_trace(published("mooncake_conversation_first_half.jsonl"))
    pooled = pooled_lru_hit(trace.requests, trace.block_tokens, 8 * kv_tokens)
    assert pooled <= infinite_cache_hit(trace.requests, trace.block_tokens)
    result = run(trace, "cache_aware", FleetSpec(8, ReplicaSpec(kv_tokens=kv_tokens)), load=0.3)
    assert 0.8 * pooled < result.summary["hit_ratio"] <= 1.01 * pooled
