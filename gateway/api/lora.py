"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, in vLLM's shapes; for administrators."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from configs.schema import ModelId
from gateway.adapter_admin import AdapterAdmin, NewAdapter
from gateway.api.administration import adapter_admin, administrator
from gateway.api.exchange import Exchange
from gateway.api.fields import Body, ignored_header
from gateway.types import Gateway, Tenant

TEXT = b"text/plain; charset=utf-8"


class LoadLoraAdapterRequest(msgspec.Struct, kw_only=True):
    """`base_model` is needed where several models are served, `rank` where the ingress cannot see the files; both,
    `owner` and `pinned` are ours. `load_inplace`: another version of a name that exists."""

    lora_name: ModelId
    lora_path: Annotated[str, Meta(min_length=1, max_length=4096)]
    load_inplace: bool = False
    base_model: ModelId | None = None
    owner: str | None = None
    rank: Annotated[int, Meta(ge=1, le=512)] = 8
    pinned: bool | None = None


class UnloadLoraAdapterRequest(msgspec.Struct, kw_only=True):
    lora_name: ModelId
    lora_int_id: int | None = None


class LoraAdapters:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._load = Body(LoadLoraAdapterRequest)
        self._unload = Body(UnloadLoraAdapterRequest)

    async def load(self, exchange: Exchange) -> None:
        """Answers when a replica has loaded it and has said a token with it."""
        tenant = self._administrator(exchange)
        request, ignored = self._load.decode(await exchange.json_body())
        exchange.extra_headers += ignored_header(ignored)
        asked = NewAdapter(
            name=request.lora_name,
            path=request.lora_path,
            base_model=request.base_model,
            owner=request.owner,
            rank=request.rank,
            replaces=request.load_inplace,
            pinned=request.pinned,
        )
        adapter = await self._admin.load(asked, tenant, f"{exchange.request_id}-0")
        exchange.extra_headers.append((b"x-warmgate-adapter", adapter.adapter_id.encode()))
        words = f"Success: LoRA adapter '{adapter.name}' added successfully."
        await exchange.send(words.encode(), media_type=TEXT)

    async def unload(self, exchange: Exchange) -> None:
        self._administrator(exchange)
        request, ignored = self._unload.decode(await exchange.json_body())
        exchange.extra_headers += ignored_header(ignored)
        await self._admin.unload(request.lora_name)
        words = f"Success: LoRA adapter '{request.lora_name}' removed successfully."
        await exchange.send(words.encode(), media_type=TEXT)

    def _administrator(self, exchange: Exchange) -> Tenant:
        return administrator(self._gateway, exchange, "Loading and unloading adapters needs an administrator's key.")

    @property
    def _admin(self) -> AdapterAdmin:
        return adapter_admin(self._gateway)
