"""What is simulated around a trace: replicas, ingresses, and how late they learn."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ops.simulate.binding import Binding, in_fair_order, looking_ahead
from ops.simulate.replica import ReplicaSpec
from ops.simulate.slo import Slo
from ops.simulate.trace import Trace
from routing.policies import PolicySpec


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """`num_replicas` of one kind behind `num_ingresses` that take requests in turn, each with its own view.

    `stats_delay_s`: how late a replica's pushed state arrives. `events_delay_s`: how late its KV events do; None =
    never, then the index mirrors what its ingress sent. `max_ahead`: late binding, at
    most so many requests wait at a replica beyond those it runs, the others in the ingress's fair queue; None = every
    request is sent at once. `look_ahead`: late binding by what the replicas say they want, request and replica chosen
    together among so many of those who are next; 0 = not. `binding` says who leaves the queue for which replica
    without that.
    """

    num_replicas: int = 8
    replica: ReplicaSpec = field(default_factory=ReplicaSpec)
    num_ingresses: int = 1
    stats_delay_s: float = 0.0
    events_delay_s: float | None = 0.0
    max_ahead: int | None = None
    look_ahead: int = 0
    binding: Binding = in_fair_order
    slo: Slo = field(default_factory=Slo)
    seed: int = 0

    def as_bound(self, policy: PolicySpec) -> FleetSpec:
        """The fleet as a gateway with this policy binds: only costs in seconds can be compared with waiting."""
        return self if policy.weighs_seconds or not self.look_ahead else replace(self, look_ahead=0)

    @property
    def binds_late(self) -> bool:
        """Whether requests may wait in the ingress."""
        return self.max_ahead is not None or self.look_ahead > 0

    def new_binding(self) -> Binding:
        """For one ingress."""
        return looking_ahead(self.look_ahead) if self.look_ahead else self.binding

    @property
    def tokens_per_s(self) -> float:
        """Prompt tokens a second that all replicas together could prefill without any cache: load 1.0."""
        return self.num_replicas * self.replica.calibration.prefill_tokens_per_s

    def fitting(self, trace: Trace) -> Trace:
        """The trace without what no replica could ever run: prompt, answer and a partial block must fit its KV."""
        return trace.only_fitting(self.replica.kv_tokens - trace.block_tokens)
