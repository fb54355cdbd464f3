"""What the replicas last said of themselves, read when somebody scrapes: nothing is copied on the request path."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from gateway.fleet import Fleet

_GAUGES = {
    "warmgate_replica_running": ("Sequences in the replica's current steps, of all ingresses.", "num_running"),
    "warmgate_replica_waiting": ("Sequences in the replica's own queue.", "num_waiting"),
    "warmgate_replica_waiting_tokens": ("Prompt tokens the replica has yet to compute.", "num_waiting_tokens"),
    "warmgate_replica_free_kv_blocks": ("KV blocks that no sequence holds.", "num_free_blocks"),
    "warmgate_replica_kv_blocks": ("KV blocks in all.", "num_blocks"),
    "warmgate_replica_preemptions": ("Sequences preempted since the engine started.", "num_preemptions"),
    "warmgate_replica_prefill_tokens_per_second": ("Learnt prefill rate.", "prefill_tokens_per_s"),
    "warmgate_replica_step_seconds": ("Mean time of a step with decodes only.", "step_time_s"),
}


class FleetCollector(Collector):
    """Gauges by replica, and who each replica is."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        links = self._fleet.links()
        for name, (help_text, field) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, help_text, labels=("replica", "model"))
            for member, link in links:
                gauge.add_metric((member.replica_id, member.model), getattr(link.stats, field))
            yield gauge
        info = InfoMetricFamily("warmgate_replica", "Who each replica is.", labels=("replica",))
        for member, link in links:
            facts = link.facts
            about = {
                "model": member.model,
                "group": member.group,
                "engine": facts.engine,
                "dtype": facts.dtype,
                "device": facts.device,
                "pid": str(member.pid),
                "host": member.host_id,
            }
            info.add_metric((member.replica_id,), about)
        yield info
