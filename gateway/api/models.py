"""GET /v1/models and /v1/models/{id}: the models a tenant may name, aliases included."""

from __future__ import annotations

from typing import Any

from configs.schema import ModelConfig
from gateway.api.exchange import Exchange
from gateway.sse import encode
from gateway.tenancy import check_model
from gateway.types import Gateway


class Models:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def list_all(self, exchange: Exchange) -> None:
        tenant = self._gateway.tenants.authenticate(exchange.header(b"authorization"))
        data = [
            self._card(name, model)
            for model in self._gateway.config.models
            if tenant.allows(model.id)
            for name in (model.id, *model.aliases)
        ]
        await exchange.send(encode({"object": "list", "data": data}))

    async def get_one(self, exchange: Exchange) -> None:
        tenant = self._gateway.tenants.authenticate(exchange.header(b"authorization"))
        name: str = exchange.scope["path_params"]["model_id"]
        model = check_model(tenant, self._gateway.config.model_named(name), name)
        await exchange.send(encode(self._card(name, model)))

    def _card(self, name: str, model: ModelConfig) -> dict[str, Any]:
        facts = self._gateway.dispatcher.facts(model.id)
        return {
            "id": name,
            "object": "model",
            "created": int(self._gateway.started_at),
            "owned_by": "warmgate",
            "root": model.id,
            "parent": None,
            "max_model_len": facts.max_model_len if facts else None,
        }
