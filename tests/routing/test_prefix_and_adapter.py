"""A warm prefix here, the adapter there: seconds decide, in one unit."""

from __future__ import annotations

import msgspec
import pytest

from routing.prefix import Namespace, block_hashes
from routing.types import ReplicaState, RouteRequest, Snapshot
from routing.warm import warm

ASKED = RouteRequest("r1", "m", "a@1", tuple(range(16)), 64, 1024, 100)


def replica(replica_id: str, load_s: float, *adapters: str) -> ReplicaState:
    return ReplicaState(
        replica_id, "m", max_model_len=8192, max_num_seqs=32, num_free_blocks=1000, num_blocks=1000,
        prefill_tokens_per_s=4000.0, step_time_s=0.02, max_adapters=4, adapters=adapters, adapter_load_s=load_s,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("load_s", "homes", "winner"),
    [
        (0.2, (), "prefix"),  # a load is sooner done than a prefill of 1,024 tokens, others' harm counted
        (2.0, (), "adapter"),
        (0.2, ("adapter",), "adapter"),  # somebody else's adapter would have to go for it
        (0.01, ("adapter",), "prefix"),  # at next to no cost
        (0.2, ("prefix", "adapter"), "prefix"),
    ],
)
def test_a_warm_prefix_and_a_resident_adapter_are_worth_their_seconds(
    load_s: float, homes: tuple[str, ...], winner: str
) -> None:
    fleet = (replica("prefix", load_s, "b@1"), replica("adapter", load_s, "a@1"))
    decision = warm(ASKED, Snapshot(fleet, {"prefix": 15}, homes=homes))
    assert decision.replica_id == winner


def test_where_both_are_nothing_beats_it_but_a_queue() -> None:
    both = replica("both", 0.2, "a@1")
    others = (replica("prefix", 0.2), replica("adapter", 0.2, "a@1"))
    matched = {"both": 15, "prefix": 15}
    assert warm(ASKED, Snapshot((*others, both), matched, homes=("both",))).replica_id == "both"
    busy = msgspec.structs.replace(both, num_waiting=20, num_waiting_tokens=20_000)
    assert warm(ASKED, Snapshot((*others, busy), matched, homes=("both", "adapter"))).replica_id == "adapter"


def test_no_two_of_model_adapter_version_and_tenant_share_a_block() -> None:
    prompt = bytes(4 * 64 * 3)
    namespaces = [
        Namespace(model, adapter, salt)
        for model in ("m", "n")
        for adapter in (None, "a@1", "a@2", "b@1")
        for salt in (b"acme", b"other")
    ]
    hashed = [block_hashes(prompt, 64, namespace) for namespace in namespaces]
    blocks = [block for hashes in hashed for block in hashes]
    assert len(blocks) == 3 * len(namespaces) == len(set(blocks))
