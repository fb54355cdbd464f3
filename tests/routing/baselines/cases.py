"""Requests and replicas for tables: a word like `a3` is replica a with three requests."""

from __future__ import annotations

import msgspec

from routing.types import ReplicaState, RouteRequest, Snapshot


def request(num_tokens: int = 1024, **changes: object) -> RouteRequest:
    base = RouteRequest("r1", "m", None, tuple(range(1, num_tokens // 64 + 1)), 64, num_tokens, 100)
    return msgspec.structs.replace(base, **changes)


def replica(replica_id: str, num_running: int = 0, **changes: object) -> ReplicaState:
    base = ReplicaState(
        replica_id, "m", max_model_len=1 << 20, max_num_seqs=256, num_running=num_running, num_free_blocks=10_000,
        num_blocks=10_000, prefill_tokens_per_s=1000.0, step_time_s=0.02,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def replicas(words: str) -> tuple[ReplicaState, ...]:
    """`"a3 b0"`: replica a with three running requests, b with none."""
    return tuple(replica(word[0], int(word[1:])) for word in words.split())


def snapshot(words: str, **changes: object) -> Snapshot:
    return Snapshot(replicas(words), **changes)  # type: ignore[arg-type]
