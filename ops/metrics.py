"""Prometheus metrics of one process: names `warmgate_*`, units in the name, one registry per instance, no globals.

Labels stay bounded: model ids and tenant ids come from the profile, statuses and reasons from fixed sets. Nothing here
is observed per token: inter-token time is one observation per request (its mean), so a streamed chunk costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
INTER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5)
E2E_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
WAIT_BUCKETS_S = (0.0005, 0.001, 0.005, 0.02, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
DECISION_BUCKETS_S = (25e-6, 50e-6, 100e-6, 150e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 50e-3)


@dataclass(frozen=True, slots=True)
class RequestObserved:
    """One finished HTTP request, as the metrics see it. Seconds; None where it never came so far."""

    route: str
    model: str
    tenant: str
    status: int
    e2e_s: float
    ttft_s: float | None = None
    inter_token_s: float | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    adapter_wait_s: float = 0.0


class Metrics:
    """Every metric of a process. Created at the composition root and passed in; `exposition` is the scrape's body."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._define_requests()
        self._define_queue()
        self._define_routing()

    def _define_requests(self) -> None:
        r = self.registry
        self.requests = Counter(
            "warmgate_requests_total",
            "HTTP requests finished; 499 = the client went away.",
            ("route", "model", "status"),
            registry=r,
        )
        self.tenant_requests = Counter(
            "warmgate_tenant_requests_total", "HTTP requests finished, by tenant.", ("tenant", "model"), registry=r
        )
        self.tokens = Counter(
            "warmgate_tokens_total",
            "Tokens: prompt (cached ones included), cached (prompt tokens from a prefix cache), completion.",
            ("model", "tenant", "kind"),
            registry=r,
        )
        self.adapter_wait_seconds = Counter(
            "warmgate_adapter_wait_seconds_total",
            "Seconds that requests waited for their LoRA adapter to be loaded, by who waited.",
            ("tenant", "model"),
            registry=r,
        )
        self.adapter_cold_requests = Counter(
            "warmgate_adapter_cold_requests_total",
            "Requests that waited for their LoRA adapter to be loaded.",
            ("tenant", "model"),
            registry=r,
        )
        self.requests_in_flight = Gauge(
            "warmgate_requests_in_flight", "Generation requests being answered.", ("model",), registry=r
        )
        self.ttft_seconds = Histogram(
            "warmgate_ttft_seconds",
            "Arrival to the first delta of the answer.",
            ("model",),
            buckets=TTFT_BUCKETS_S,
            registry=r,
        )
        self.inter_token_seconds = Histogram(
            "warmgate_inter_token_seconds",
            "Mean time between tokens of one request.",
            ("model",),
            buckets=INTER_TOKEN_BUCKETS_S,
            registry=r,
        )
        self.e2e_seconds = Histogram(
            "warmgate_e2e_seconds",
            "Arrival to the last byte, of requests that got a delta.",
            ("model",),
            buckets=E2E_BUCKETS_S,
            registry=r,
        )
        self.usage_records = Counter("warmgate_usage_records_total", "Usage records made.", registry=r)
        self.usage_records_dropped = Counter(
            "warmgate_usage_records_dropped_total", "Usage records the log could not take.", registry=r
        )
        self.prompt_cache = Counter(
            "warmgate_prompt_tokenised_chars_total",
            "Characters of prompts, by where their tokens came from: cache or tokenizer.",
            ("source",),
            registry=r,
        )

    def _define_queue(self) -> None:
        r = self.registry
        self.queue_depth = Gauge("warmgate_queue_depth", "Jobs waiting at this ingress.", ("model",), registry=r)
        self.queue_tokens = Gauge(
            "warmgate_queue_tokens", "Prompt tokens of the jobs waiting at this ingress.", ("model",), registry=r
        )
        self.queue_wait_seconds = Histogram(
            "warmgate_queue_wait_seconds",
            "Admission to the hand-over to a replica.",
            ("model",),
            buckets=WAIT_BUCKETS_S,
            registry=r,
        )
        self.refusals = Counter(
            "warmgate_refusals_total",
            "Requests refused before they ran, by error code (quota, queue, deadline, no replica).",
            ("reason",),
            registry=r,
        )

    def _define_routing(self) -> None:
        r = self.registry
        self.decisions = Counter(
            "warmgate_routing_decisions_total", "Jobs placed, by policy and replica.", ("policy", "replica"), registry=r
        )
        self.decision_seconds = Histogram(
            "warmgate_routing_decision_seconds",
            "Time to match prefixes, weigh and pick; hashing the prompt comes before it.",
            ("policy",),
            buckets=DECISION_BUCKETS_S,
            registry=r,
        )
        self.routed_tokens = Counter(
            "warmgate_routed_prompt_tokens_total",
            "Prompt tokens placed; matched ones were believed to be cached at the chosen replica.",
            ("model", "kind"),
            registry=r,
        )
        self.retries = Counter(
            "warmgate_retries_total", "New attempts elsewhere, by what ended the old one.", ("reason",), registry=r
        )
        self.links_lost = Counter("warmgate_replica_links_lost_total", "Channel links that broke.", registry=r)
        self.replicas_ready = Gauge(
            "warmgate_replicas_ready", "Replicas this ingress can send to.", ("model",), registry=r
        )
        self.replica_outstanding = Gauge(
            "warmgate_replica_outstanding_requests", "Jobs this ingress has at a replica.", ("replica",), registry=r
        )

    def observe(self, done: RequestObserved) -> None:
        """Counts one finished request everywhere it belongs."""
        self.requests.labels(done.route, done.model, str(done.status)).inc()
        if done.tenant:
            self.tenant_requests.labels(done.tenant, done.model).inc()
        if done.ttft_s is not None:
            self.e2e_seconds.labels(done.model).observe(done.e2e_s)
            self.ttft_seconds.labels(done.model).observe(done.ttft_s)
        if done.inter_token_s is not None:
            self.inter_token_seconds.labels(done.model).observe(done.inter_token_s)
        if done.adapter_wait_s:
            self.adapter_wait_seconds.labels(done.tenant, done.model).inc(done.adapter_wait_s)
            self.adapter_cold_requests.labels(done.tenant, done.model).inc()
        for kind, num_tokens in (
            ("prompt", done.num_prompt_tokens),
            ("cached", done.num_cached_tokens),
            ("completion", done.num_completion_tokens),
        ):
            if num_tokens:
                self.tokens.labels(done.model, done.tenant, kind).inc(num_tokens)

    def exposition(self) -> bytes:
        """The text format of every metric; `content_type` is its media type."""
        return generate_latest(self.registry)
