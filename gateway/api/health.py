"""GET /health, /ready, /version, /metrics: for probes and scrapers; no key asked."""

from __future__ import annotations

from importlib.metadata import version

from gateway.api.exchange import Exchange
from gateway.errors import UnavailableError
from gateway.sse import encode
from gateway.types import Gateway


class Health:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._version = version("warmgate")

    async def health(self, exchange: Exchange) -> None:
        """Alive: this process answers."""
        await exchange.send(encode({"status": "ok"}))

    async def ready(self, exchange: Exchange) -> None:
        """Ready: every model has a replica. 503 names those that have none."""
        dispatcher = self._gateway.dispatcher
        num_ready = {model.id: dispatcher.num_ready(model.id) for model in self._gateway.config.models}
        lacking = [model_id for model_id, count in num_ready.items() if not count]
        if lacking:
            raise UnavailableError(f"No replica is ready for: {', '.join(lacking)}.", retry_after_s=1.0)
        await exchange.send(encode({"status": "ready", "replicas": num_ready}))

    async def version(self, exchange: Exchange) -> None:
        await exchange.send(encode({"version": self._version}))

    async def metrics(self, exchange: Exchange) -> None:
        metrics = self._gateway.metrics
        await exchange.send(metrics.exposition(), media_type=metrics.content_type.encode())
