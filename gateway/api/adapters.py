"""/v1/adapters: the adapters of the fleet as resources, with how each is doing; for administrators."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from configs.schema import ModelId
from gateway.adapter_admin import AdapterAdmin, NewAdapter
from gateway.adapter_states import AdapterView
from gateway.api.administration import adapter_admin, administrator
from gateway.api.exchange import Exchange
from gateway.api.fields import Body
from gateway.errors import ApiError, BadRequestError, ModelNotFoundError
from gateway.sse import encode
from gateway.types import Gateway, Tenant


class CreateAdapterRequest(msgspec.Struct, kw_only=True):
    """`name` as clients will say it in `model`; a name that exists gets a new version, unless `replace` is false.
    `rank` counts where the ingress cannot see the files."""

    name: ModelId
    path: Annotated[str, Meta(min_length=1, max_length=4096)]
    base_model: ModelId | None = None
    owner: str | None = None
    rank: Annotated[int, Meta(ge=1, le=512)] = 8
    pinned: bool | None = None
    replace: bool = True


class AdapterList(msgspec.Struct, kw_only=True):
    """Every adapter, by name."""

    object: str = "list"
    data: list[AdapterView]


class AdapterDeleted(msgspec.Struct, kw_only=True):
    """Requests under way end as they would have."""

    id: str
    object: str = "adapter"
    deleted: bool = True


class Adapters:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._create = Body(CreateAdapterRequest)

    async def collection(self, exchange: Exchange) -> None:
        """GET lists, POST adds: it answers when a replica has loaded it and has said a token with it."""
        tenant = self._administrator(exchange)
        if exchange.scope["method"] == "POST":
            await self._add(exchange, tenant)
        else:
            await exchange.send(encode(AdapterList(data=await self._admin.views())))

    async def item(self, exchange: Exchange) -> None:
        """GET shows, DELETE removes every version."""
        self._administrator(exchange)
        name: str = exchange.scope["path_params"]["name"]
        if exchange.scope["method"] == "DELETE":
            await self._remove(exchange, name)
        else:
            await exchange.send(encode(await self._view(name)))

    async def _add(self, exchange: Exchange, tenant: Tenant) -> None:
        request, unknown = self._create.decode(await exchange.json_body())
        if unknown:  # a misspelt one would change what is stored in silence
            raise BadRequestError(f"Unknown field: {', '.join(unknown)}.", param=unknown[0])
        asked = NewAdapter(
            name=request.name,
            path=request.path,
            base_model=request.base_model,
            owner=request.owner,
            rank=request.rank,
            replaces=request.replace,
            pinned=request.pinned,
        )
        try:
            await self._admin.load(asked, tenant, f"{exchange.request_id}-0")
        except ApiError as error:
            raise _in_our_words(error) from error
        await exchange.send(encode(await self._view(request.name)), status=201)

    async def _remove(self, exchange: Exchange, name: str) -> None:
        known = await self._view(name)
        if known.state != "failed":
            await self._admin.unload(name)
        else:
            await self._admin.forget_failure(name)
        await exchange.send(encode(AdapterDeleted(id=name)))

    async def _view(self, name: str) -> AdapterView:
        found = next((view for view in await self._admin.views() if view.id == name), None)
        if found is None:
            raise ModelNotFoundError(f"The adapter {name!r} does not exist.", param="name")
        return found

    def _administrator(self, exchange: Exchange) -> Tenant:
        return administrator(self._gateway, exchange, "Looking after adapters needs an administrator's key.")

    @property
    def _admin(self) -> AdapterAdmin:
        return adapter_admin(self._gateway)


_OUR_FIELDS = {"lora_name": "name", "lora_path": "path"}
_OUR_WORDS = {"'load_inplace' to True": "'replace' to true", "'lora_name'": "'name'", "'lora_path'": "'path'"}


def _in_our_words(error: ApiError) -> ApiError:
    """The administrator's work speaks of vLLM's fields; this route has other names for them."""
    error.param = _OUR_FIELDS.get(error.param or "", error.param)
    for theirs, ours in _OUR_WORDS.items():
        error.message = error.message.replace(theirs, ours)
    return error
