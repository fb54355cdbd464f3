"""Late binding on the virtual clock: the gateway's own choice of request and replica."""

from __future__ import annotations

import pytest

from ops.simulate.driver import run
from ops.simulate.fleet import FleetSpec
from ops.simulate.replica import ReplicaSpec, SimReplica
from ops.simulate.trace import Trace, TraceRequest
from routing.policies import POLICIES

BLOCK = 64


def talks(num: int, *, tenants: int = 1, gap_s: float = 0.05) -> Trace:
    """Conversations that come back: every fifth prompt goes on where an earlier one ended. Every eighth is long."""
    requests = []
    for i in range(num):
        num_blocks = 120 if i % 8 == 3 else 10 + i % 7
        blocks = tuple(1000 * (i % 5) + j if j < 8 else 1_000_000 + 1000 * i + j for j in range(num_blocks))
        requests.append(TraceRequest(i * gap_s, num_blocks * BLOCK, 20, blocks, tenant=f"t{i % tenants}"))
    return Trace("talks", BLOCK, tuple(requests))


def fleet(**changes: object) -> FleetSpec:
    replica = ReplicaSpec(kv_tokens=64_000, order="shortest", max_num_batched_tokens=512, max_num_seqs=8)
    return FleetSpec(num_replicas=2, replica=replica, look_ahead=16, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_ingresses", [1, 3])
@pytest.mark.parametrize("tenants", [1, 3])
def test_a_run_ends_and_everybody_is_answered(tenants: int, num_ingresses: int) -> None:
    """Tenants who may not pass each other, heads that fit nowhere: nobody looks again without end."""
    spec = fleet(num_ingresses=num_ingresses, stats_delay_s=0.005)
    result = run(talks(200, tenants=tenants), "warm", spec, 2.0)
    assert result.summary["num_requests"] == 200
    assert len(result.ttfts_s) == 200


def test_in_overload_more_are_in_time_than_when_all_are_sent_at_once() -> None:
    trace = talks(300)
    late = run(trace, "warm", fleet(), 1.6)
    at_once = run(trace, "warm", FleetSpec(num_replicas=2, replica=fleet().replica), 1.6)
    assert late.attainment >= at_once.attainment


def test_only_a_policy_that_weighs_in_seconds_binds_late() -> None:
    assert fleet().as_bound(POLICIES["warm"]).look_ahead == 16
    assert fleet().as_bound(POLICIES["round_robin"]).look_ahead == 0


def test_the_adapter_of_a_request_that_has_to_wait_is_loaded_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    before = SimReplica.prefetch

    def prefetch(self: SimReplica, name: str, rank: int, now: float) -> None:
        asked.append(name)
        before(self, name, rank, now)

    monkeypatch.setattr(SimReplica, "prefetch", prefetch)
    requests = tuple(TraceRequest(i * 0.05, 2000, 50, adapter=f"a{i % 50}@1") for i in range(200))
    replica = ReplicaSpec(order="shortest", max_adapters=4, kv_tokens=500_000)
    run(Trace("adapters", BLOCK, requests), "warm", FleetSpec(num_replicas=2, replica=replica, look_ahead=16), 1.2)
    assert asked
