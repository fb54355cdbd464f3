"""Adapters that come and go while the gateway runs: looked at, tried on a replica, and only then what a name means.

load:   files (where this process can see them) ─► offered as name@version ─► one token asked of a replica
                                                                │ it answers                │ it cannot
                                                          current from now on        removed, and why is told
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from configs.lora import LoraError, LoraFiles, lora_folder, read_lora
from configs.schema import Config, ModelConfig
from gateway.errors import (
    AdapterNotLoadableError,
    BadRequestError,
    ModelNotFoundError,
    RegistryUnavailableError,
)
from gateway.prompt import Prompter
from gateway.types import Dispatcher, Job, Tenant
from replicas.contract import SamplingParams
from routing.adapters import Adapter, AdapterConflictError, AdapterRegistry, AdapterWatch, next_version
from routing.store import StoreError

KEPT_VERSIONS = 2
"""Of an adapter that is replaced: the newest, and the one before it, whose answers may still be under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAdapter:
    """What an administrator asks for. `replaces`: the name may exist, and gets a new version then. `rank` counts where
    the files cannot be seen from here. `owner`, `pinned`: None is what the version before had, else all, and not."""

    name: str
    path: str
    base_model: str | None = None
    owner: str | None = None
    rank: int = 8
    replaces: bool = False
    pinned: bool | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """Where adapters are tried: a token is asked for in the name of a tenant."""

    dispatcher: Dispatcher
    prompters: Callable[[str], Prompter]
    clock: Callable[[], float]


class AdapterAdmin:
    """Changes the shared catalogue. `watch`: this process's copy, brought up to date after every change."""

    def __init__(self, config: Config, registry: AdapterRegistry, watch: AdapterWatch, trial: Trial) -> None:
        self._config = config
        self._registry = registry
        self._watch = watch
        self._trial = trial

    async def load(self, asked: NewAdapter, tenant: Tenant, request_id: str) -> Adapter:
        """The adapter as it is in the catalogue now. Raises ApiError; then nothing has changed for clients."""
        model = self._base_model(asked)
        files = await _files(asked)
        try:
            entries = await self._registry.read()
            await self._watch.refresh()
            current = self._watch.catalogue.named(asked.name)
            if current is not None and not asked.replaces:
                raise BadRequestError(
                    f"The lora adapter '{asked.name}' has already been loaded. If you want to load the adapter in "
                    "place, set 'load_inplace' to True.",
                    param="lora_name",
                )
            version = next_version(asked.name, entries, self._watch.catalogue)
            asked = _inherited(asked, current)
            adapter = _adapter(asked, model, version, files)
            if current is not None and _has_same_weights(current, adapter):
                adapter = msgspec.structs.replace(adapter, version=current.version)
            else:
                await self._registry.offer(adapter)
                await self._try(adapter, model, tenant, request_id)
            if adapter != current:
                await self._registry.add(adapter)
                await self._drop_old(asked.name)
                await self._watch.refresh()
        except StoreError as error:
            raise _unreachable(error) from error
        except AdapterConflictError as error:
            raise BadRequestError(str(error), param="lora_name") from error
        return adapter

    async def unload(self, name: str) -> list[Adapter]:
        """Every version of a name goes; requests under way end as they would have. Raises ApiError."""
        try:
            await self._watch.refresh()
            gone = await self._registry.remove(name, self._watch.catalogue)
            await self._watch.refresh()
        except StoreError as error:
            raise _unreachable(error) from error
        except AdapterConflictError as error:
            raise ModelNotFoundError(f"The lora adapter '{name}' cannot be found.", param="lora_name") from error
        return gone

    def _base_model(self, asked: NewAdapter) -> ModelConfig:
        if self._config.model_named(asked.name) is not None:
            raise BadRequestError(
                f"The lora adapter '{asked.name}' conflicts with a served base model.", param="lora_name"
            )
        models = self._config.models
        if asked.base_model is None and len(models) > 1:
            names = ", ".join(model.id for model in models)
            raise BadRequestError(
                f"Missing required parameter: 'base_model': this gateway serves {names}.",
                param="base_model",
                code="missing_required_parameter",
            )
        named = models[0] if asked.base_model is None else self._config.model_named(asked.base_model)
        if named is None:
            raise ModelNotFoundError(f"The model {asked.base_model!r} does not exist.", param="base_model")
        if asked.owner is not None and all(tenant.id != asked.owner for tenant in self._config.tenants):
            raise BadRequestError(f"There is no tenant {asked.owner!r}.", param="owner")
        return named

    async def _try(self, adapter: Adapter, model: ModelConfig, tenant: Tenant, request_id: str) -> None:
        """Has a replica load it and say one token. Raises what a client would have seen."""
        (prompt,) = await self._trial.prompters(model.id).texts(["a"], add_special_tokens=True)
        job = Job(
            request_id=request_id,
            model=model,
            tenant=tenant,
            prompt=prompt,
            sampling=SamplingParams(max_tokens=1, seed=0, temperature=0.0),
            salt=tenant.salt,
            adapter=adapter.adapter_id,
            adapter_rank=adapter.rank,
            deadline=self._trial.clock() + self._config.admission.max_wait_s,
        )
        deltas = self._trial.dispatcher.generate(job)
        try:
            await deltas.first()
        except BaseException as error:
            await self._registry.remove(adapter.adapter_id)
            if isinstance(error, ModelNotFoundError):  # of all that can go wrong, this one is the adapter's fault
                raise AdapterNotLoadableError(error.message, param="lora_path") from error
            raise
        finally:
            await deltas.aclose()

    async def _drop_old(self, name: str) -> None:
        await self._watch.refresh()
        for adapter in self._watch.catalogue.versions(name)[:-KEPT_VERSIONS]:
            await self._registry.remove(adapter.adapter_id, [adapter])


def _inherited(asked: NewAdapter, current: Adapter | None) -> NewAdapter:
    """With what a new version takes over from the one before: above all, nobody else may suddenly use it."""
    if current is None:
        return replace(asked, pinned=bool(asked.pinned))
    return replace(
        asked,
        owner=current.owner if asked.owner is None else asked.owner,
        pinned=current.pinned if asked.pinned is None else asked.pinned,
    )


async def _files(asked: NewAdapter) -> tuple[LoraFiles, str] | None:
    """The checkpoint and its digest; None where its folder is not this machine's. Raises AdapterNotLoadableError."""
    try:
        return await asyncio.to_thread(_read, asked.path)
    except LoraError as error:
        raise AdapterNotLoadableError(str(error), param="lora_path") from error


def _read(path: str) -> tuple[LoraFiles, str] | None:
    folder = lora_folder(path)
    if not folder.is_absolute():
        raise BadRequestError("'lora_path' must be an absolute path of the replicas' machines.", param="lora_path")
    try:
        if not folder.is_dir():
            return None
    except (OSError, ValueError) as error:
        raise LoraError(f"{folder} cannot be looked at: {error}") from error
    files = read_lora(folder)
    return files, files.digest()


def _adapter(asked: NewAdapter, model: ModelConfig, version: str, files: tuple[LoraFiles, str] | None) -> Adapter:
    fields = {
        "name": asked.name,
        "base_model": model.id,
        "version": version,
        "path": asked.path,
        "rank": asked.rank,
        "owner": asked.owner,
        "pinned": bool(asked.pinned),
    }
    if files is not None:
        fields |= {"rank": files[0].config.max_rank, "num_bytes": files[0].num_bytes, "digest": files[1]}
    try:
        return msgspec.convert(fields, Adapter)
    except msgspec.ValidationError as error:
        raise BadRequestError(f"Invalid value: {error}.", param="lora_name") from error


def _has_same_weights(current: Adapter, new: Adapter) -> bool:
    """Loading in place what is there already keeps its version, and with it every cache."""
    return bool(new.digest) and (current.digest, current.path, current.base_model) == (
        new.digest,
        new.path,
        new.base_model,
    )


def _unreachable(error: StoreError) -> RegistryUnavailableError:
    return RegistryUnavailableError(f"The registry of adapters cannot be reached: {error}", retry_after_s=1.0)
