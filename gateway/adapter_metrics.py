"""LoRA adapters for who scrapes: what replicas say of their loads, and how sources are doing. Read at the scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from gateway.adapter_sources import AdapterSources
from gateway.slot import Link
from replicas.contract import ADAPTER_LOAD_BUCKETS_S
from routing.adapters import Catalogue
from routing.registry import Member

_BOUNDS = (*map(str, ADAPTER_LOAD_BUCKETS_S), "+Inf")


def loads(links: Sequence[tuple[Member, Link]]) -> Iterator[Metric]:
    """Of every replica that has loaded an adapter."""
    labels = ("replica", "model")
    seconds = HistogramMetricFamily(
        "warmgate_adapter_load_seconds", "Loading an adapter, fetching it included; loads that failed not.",
        labels=labels,
    )  # fmt: skip
    outcomes = CounterMetricFamily(
        "warmgate_adapter_loads", "Loads of adapters since the replica started.", labels=(*labels, "outcome")
    )
    evictions = CounterMetricFamily(
        "warmgate_adapter_evictions", "Adapters that made room for others.", labels=labels
    )  # fmt: skip
    for member, link in links:
        stats = link.stats.adapter_loads
        if stats is not None:
            own = (member.replica_id, member.model)
            buckets = stats.buckets or (0,) * len(_BOUNDS)
            cumulated = [(bound, float(n)) for bound, n in zip(_BOUNDS, accumulate(buckets), strict=True)]
            seconds.add_metric(own, cumulated, stats.seconds)
            outcomes.add_metric((*own, "ok"), sum(buckets))
            outcomes.add_metric((*own, "failed"), stats.num_failed)
            evictions.add_metric(own, stats.num_evicted)
    yield from (seconds, outcomes, evictions)


class SourcesCollector(Collector):
    """Sources of adapters. Looks and changes are those of this ingress: of all ingresses one looks at a time."""

    def __init__(self, sources: AdapterSources, catalogue: Callable[[], Catalogue]) -> None:
        self._sources = sources
        self._catalogue = catalogue

    def collect(self) -> Iterator[Metric]:
        yield self._gauge(
            "warmgate_adapter_source_adapters", "Adapters that are of a source now.", self._num_adapters()
        )
        keepers = [(keeper.source.url, keeper.counts) for keeper in self._sources.keepers]
        for name, words, values in (
            ("up", "1 = the last look of this ingress saw something.", {u: float(c.reachable) for u, c in keepers}),
            ("failed_folders", "Folders that cannot be served.", {u: float(c.num_failed) for u, c in keepers}),
            ("waiting_folders", "Folders that are still changing.", {u: float(c.num_waiting) for u, c in keepers}),
            ("last_look_timestamp_seconds", "When this ingress last saw it.", {u: c.seen_at for u, c in keepers}),
        ):
            yield self._gauge(f"warmgate_adapter_source_{name}", words, values)
        looks = CounterMetricFamily("warmgate_adapter_source_looks", "Looks, by outcome.", labels=("source", "outcome"))
        changes = CounterMetricFamily(
            "warmgate_adapter_source_changes", "Adapters added, failed or removed.", labels=("source", "change")
        )
        for url, counts in keepers:
            for outcome, number in counts.looks.items():
                looks.add_metric((url, outcome), number)
            for change, number in counts.changes.items():
                changes.add_metric((url, change), number)
        yield from (looks, changes)

    def _num_adapters(self) -> dict[str, float]:
        found = {keeper.source.url: 0.0 for keeper in self._sources.keepers}
        for adapter in self._catalogue().current():
            if adapter.source in found:
                found[adapter.source] += 1
        return found

    def _gauge(self, name: str, words: str, values: dict[str, float]) -> Metric:
        gauge = GaugeMetricFamily(name, words, labels=("source",))
        for url, value in values.items():
            gauge.add_metric((url,), value)
        return gauge
