"""Keeps vLLM's Prometheus metrics out of the replica's process: Warmgate has its own, from the same counters."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import PrometheusStatLogger


class Quiet(PrometheusStatLogger):
    """vLLM adds its own logger unless a class of this kind is given; this one writes nothing down."""

    def __init__(self, vllm_config: Any, engine_indexes: Any = None) -> None:
        pass

    def record(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_sleep_state(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_admission_rejection(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log(self) -> None:
        pass

    def log_engine_initialized(self) -> None:
        pass
