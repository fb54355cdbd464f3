"""The KV registry as this ingress has it, for who scrapes: how exact, how far behind, how large."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from routing.index import PrefixIndex
from routing.kv_registry import KvRegistry


class RegistryCollector(Collector):
    """Gauges of the index, counters of the registry; read at the scrape, nothing is counted on the request path."""

    def __init__(self, registry: KvRegistry, index: PrefixIndex) -> None:
        self._registry = registry
        self._index = index

    def collect(self) -> Iterator[Metric]:
        index, registry = self._index, self._registry
        yield GaugeMetricFamily("warmgate_prefix_index_blocks", "Routing blocks in the index.", len(index))
        yield GaugeMetricFamily("warmgate_prefix_index_bytes", "Memory the index takes.", index.num_bytes)
        lag = GaugeMetricFamily(
            "warmgate_kv_registry_lag_seconds",
            "How long a replica has had KV events that this ingress has not read; 0 = it has read all.",
            labels=("replica",),
        )
        exact = GaugeMetricFamily(
            "warmgate_kv_registry_exact",
            "1 = the index has the replica's own word, 0 = a guess from what was sent to it.",
            labels=("replica",),
        )
        for replica_id, lag_s in registry.lags_s().items():
            lag.add_metric((replica_id,), lag_s)
            exact.add_metric((replica_id,), float(index.is_exact(replica_id)))
        yield lag
        yield exact
        lost = CounterMetricFamily(
            "warmgate_kv_registry_lost", "KV streams that could not be followed further, by reason.", labels=("reason",)
        )
        for reason, number in registry.num_lost.items():
            lost.add_metric((reason,), number)
        yield lost
        yield CounterMetricFamily("warmgate_kv_registry_heals", "KV streams found again.", registry.num_heals)
        yield CounterMetricFamily("warmgate_kv_registry_entries", "Entries of KV streams read.", registry.num_entries)
