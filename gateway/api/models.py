"""GET /v1/models and /v1/models/{id}: what a tenant may name: models, their aliases, adapters."""

from __future__ import annotations

from typing import Any

from gateway.api.exchange import Exchange
from gateway.names import ModelNames, Named
from gateway.sse import encode
from gateway.types import Gateway


class Models:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._names = ModelNames(gateway.config, gateway.catalogue)

    async def list_all(self, exchange: Exchange) -> None:
        tenant = self._gateway.tenants.authenticate(exchange.header(b"authorization"))
        data = [self._card(named) for named in self._names.listed(tenant)]
        await exchange.send(encode({"object": "list", "data": data}))

    async def get_one(self, exchange: Exchange) -> None:
        tenant = self._gateway.tenants.authenticate(exchange.header(b"authorization"))
        name: str = exchange.scope["path_params"]["model_id"]
        await exchange.send(encode(self._card(self._names.resolve(tenant, name))))

    def _card(self, named: Named) -> dict[str, Any]:
        """An adapter has its base model as `parent` and, where vLLM shows a path, its version as `root`."""
        model, adapter_id = named.model, named.adapter_id
        facts = self._gateway.dispatcher.facts(model.id)
        return {
            "id": named.name,
            "object": "model",
            "created": int(self._gateway.started_at),
            "owned_by": "warmgate",
            "root": adapter_id or model.id,
            "parent": model.id if adapter_id else None,
            "max_model_len": facts.max_model_len if facts else None,
        }
