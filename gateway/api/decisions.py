"""GET /v1/routing/decisions/{request_id}: why a request of the tenant went where it went."""

from __future__ import annotations

from gateway.api.exchange import Exchange
from gateway.sse import encode
from gateway.types import Gateway


class Decisions:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def get_one(self, exchange: Exchange) -> None:
        """Whichever ingress routed it; 404 for another tenant's."""
        tenant = self._gateway.tenants.authenticate(exchange.header(b"authorization"))
        asked_id: str = exchange.scope["path_params"]["request_id"]
        await exchange.send(encode(await self._gateway.explainer.explain(asked_id, tenant.tenant_id)))
