"""What the replicas last said of themselves, read when somebody scrapes: nothing is copied on the request path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from gateway.adapter_metrics import loads
from gateway.fleet import Fleet
from gateway.slot import Link
from routing.registry import Member

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

_COUNTERS = {
    "warmgate_spec_decode_num_drafts": ("Chains or trees of guessed tokens that were checked.", "num_drafts"),
    "warmgate_spec_decode_num_draft_tokens": ("Guessed tokens that were checked.", "num_draft_tokens"),
    "warmgate_spec_decode_num_accepted_tokens": ("Guessed tokens that came true.", "num_accepted_tokens"),
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
        for name, (help_text, field) in _COUNTERS.items():
            counter = CounterMetricFamily(name, help_text, labels=("replica", "model"))
            for member, link in links:
                counter.add_metric((member.replica_id, member.model), getattr(link.stats, field))
            yield counter
        yield _accepted_by_position(links)
        yield from loads(links)
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


def _accepted_by_position(links: Iterable[tuple[Member, Link]]) -> Metric:
    counter = CounterMetricFamily(
        "warmgate_spec_decode_num_accepted_tokens_per_pos",
        "Guessed tokens that came true, by position behind the last known token, from 0.",
        labels=("replica", "model", "position"),
    )
    for member, link in links:
        for position, num_accepted in enumerate(link.stats.num_accepted_by_position):
            counter.add_metric((member.replica_id, member.model, str(position)), num_accepted)
    return counter
