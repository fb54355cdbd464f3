"""Adapters that come and go while the gateway runs: looked at, tried on a replica, and only then what a name means.

load:   files (where this process can see them) ─► offered as name@version ─► one token asked of a replica
                                                                │ it answers                │ it cannot
                                                          current from now on        removed, and why is told
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from time import time

import msgspec

from configs.adapters.cache import Fetched
from configs.adapters.files import AdapterFiles, Fit
from configs.adapters.place import is_url, without_secrets
from configs.lora import LoraError
from configs.schema import Config, ModelConfig
from gateway.adapter_states import AdapterView, views
from gateway.errors import (
    AdapterNotLoadableError,
    AdapterUnreachableError,
    BadRequestError,
    ModelNotFoundError,
    RegistryUnavailableError,
)
from gateway.prompt import Prompter
from gateway.source_plan import is_taken
from gateway.types import Dispatcher, Job, Tenant
from replicas.contract import SamplingParams
from routing.adapter_watch import AdapterWatch
from routing.adapters import Adapter, AdapterConflictError, AdapterRegistry, Failure, next_version
from routing.store import StoreError
from routing.types import ReplicaState

MAX_READS = 4
"""Adapters whose files are read, or fetched, at a time."""

KEPT_VERSIONS = 2
"""Of an adapter that is replaced: the newest, and the one before it, whose answers may still be under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAdapter:
    """What an administrator asks for. `replaces`: the name may exist, and gets a new version then. `rank` counts where
    the files cannot be seen from here. `owner`, `pinned`: None is what the version before had, else all, and not.
    `source`: the URL of the source it is from, if it is from one: that decides about owner and pin alone. `allowed`:
    whether whoever asks may still."""

    name: str
    path: str
    base_model: str | None = None
    owner: str | None = None
    rank: int = 8
    replaces: bool = False
    pinned: bool | None = None
    source: str = ""
    allowed: Callable[[], bool] = lambda: True


@dataclass(frozen=True, slots=True)
class Trial:
    """Where adapters are tried: a token is asked for in the name of a tenant. `states`: of a model's replicas. `files`
    and `fits`: what their files are looked at with, and must be like, by model id."""

    dispatcher: Dispatcher
    prompters: Callable[[str], Prompter]
    clock: Callable[[], float]
    states: Callable[[str], Iterable[ReplicaState]]
    files: AdapterFiles
    fits: Mapping[str, Fit]
    wall: Callable[[], float] = time


class AdapterAdmin:
    """Changes the shared catalogue. `watch`: this process's copy, brought up to date after every change."""

    def __init__(self, config: Config, registry: AdapterRegistry, watch: AdapterWatch, trial: Trial) -> None:
        self._config = config
        self._registry = registry
        self._watch = watch
        self._trial = trial
        self._wall = trial.wall
        # Of their own: files that do not come must not keep prompts from being tokenised.
        self._threads = ThreadPoolExecutor(MAX_READS, "adapter files")

    async def views(self) -> list[AdapterView]:
        """Every adapter, and how it is doing. Raises ApiError."""
        try:
            await self._watch.refresh()
            failures = await self._registry.failures()
        except StoreError as error:
            raise _unreachable(error) from error
        return views(self._watch.catalogue, failures, self._trial.states)

    async def load(self, asked: NewAdapter, tenant: Tenant, request_id: str) -> Adapter:
        """The adapter as it is in the catalogue now. Raises ApiError; then nothing has changed for clients, and why is
        remembered."""
        try:
            adapter = await self._load(asked, tenant, request_id)
        except AdapterNotLoadableError as error:
            with contextlib.suppress(StoreError):
                failure = Failure(
                    name=asked.name, path=without_secrets(asked.path), message=error.message, at=self._wall()
                )
                await self._registry.note_failure(failure)
            raise
        with contextlib.suppress(StoreError):
            await self._registry.forget_failure(asked.name)
        return adapter

    async def _load(self, asked: NewAdapter, tenant: Tenant, request_id: str) -> Adapter:
        model = self._base_model(asked)
        files = await self._files(asked, model)
        try:
            entries = await self._registry.read()
            await self._watch.refresh()
            current = self._watch.catalogue.named(asked.name)
            others = frozenset(source.url for source in self._config.adapter_sources) - {asked.source}
            if asked.source and is_taken(current, others):
                raise BadRequestError(f"The name '{asked.name}' is that of an adapter from elsewhere.")
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
                await self._check_still_wanted(asked, current, adapter)
            if adapter != current:
                await self._registry.add(adapter)
                await self._drop_old(asked.name)
                await self._watch.refresh()
        except StoreError as error:
            raise _unreachable(error) from error
        except AdapterConflictError as error:
            raise BadRequestError(str(error), param="lora_name") from error
        return adapter

    async def forget_failure(self, name: str) -> None:
        """Of a name that never was served. Raises ApiError."""
        try:
            await self._registry.forget_failure(name)
        except StoreError as error:
            raise _unreachable(error) from error

    async def unload(self, name: str) -> list[Adapter]:
        """Every version of a name goes; requests under way end as they would have. Raises ApiError."""
        try:
            await self._watch.refresh()
            await self._registry.forget_failure(name)
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

    async def _files(self, asked: NewAdapter, model: ModelConfig) -> Fetched | None:
        """The checkpoint and its digest; None where its folder is not this machine's. Raises AdapterNotLoadableError,
        AdapterUnreachableError, BadRequestError."""
        if not is_url(asked.path) and not asked.path.startswith(("/", "~")):
            raise BadRequestError(
                "'lora_path' must be an absolute path of the replicas' machines, or a URL.", param="lora_path"
            )
        fit = self._trial.fits[model.id]
        try:
            read = partial(self._trial.files.read, asked.path, fit, asked.source)
            reading = asyncio.get_running_loop().run_in_executor(self._threads, read)
            async with asyncio.timeout(self._config.adapter_files.fetch_timeout_s + 1.0):
                return await asyncio.shield(reading)
        except LoraError as error:
            raise AdapterNotLoadableError(str(error), param="lora_path") from error
        except OSError as error:  # a timeout is one
            raise AdapterUnreachableError(
                str(error) or "its files could not be read in time", param="lora_path", retry_after_s=5.0
            ) from error

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
            await self._withdraw(adapter)
            if isinstance(error, ModelNotFoundError):  # of all that can go wrong, this one is the adapter's fault
                raise AdapterNotLoadableError(error.message, param="lora_path") from error
            raise
        finally:
            await deltas.aclose()

    async def _check_still_wanted(self, asked: NewAdapter, current: Adapter | None, offered: Adapter) -> None:
        """A trial takes a while. Raises ApiError where the name was changed, or the right to change it lost, meanwhile;
        StoreError."""
        await self._watch.refresh()
        catalogue = self._watch.catalogue
        if not asked.allowed():
            await self._withdraw(offered)
            raise RegistryUnavailableError("another ingress looks after it now", retry_after_s=1.0)
        if catalogue.named(asked.name) != current or catalogue.find(offered.adapter_id) is None:
            await self._withdraw(offered)
            raise BadRequestError(f"'{asked.name}' was changed by somebody else meanwhile.", param="lora_name")

    async def _withdraw(self, offered: Adapter) -> None:
        """An adapter that was tried goes, whatever keeps us from waiting for it."""
        with contextlib.suppress(StoreError, AdapterConflictError):  # what went wrong before is what is told
            await asyncio.shield(self._registry.remove(offered.adapter_id))

    async def _drop_old(self, name: str) -> None:
        await self._watch.refresh()
        for adapter in self._watch.catalogue.versions(name)[:-KEPT_VERSIONS]:
            await self._registry.remove(adapter.adapter_id, [adapter])


def _inherited(asked: NewAdapter, current: Adapter | None) -> NewAdapter:
    """With what a new version takes over from the one before: above all, nobody else may suddenly use it."""
    if current is None or asked.source:
        return replace(asked, pinned=bool(asked.pinned))
    return replace(
        asked,
        owner=current.owner if asked.owner is None else asked.owner,
        pinned=current.pinned if asked.pinned is None else asked.pinned,
    )


def _adapter(asked: NewAdapter, model: ModelConfig, version: str, found: Fetched | None) -> Adapter:
    fields = {
        "name": asked.name,
        "base_model": model.id,
        "version": version,
        "path": asked.path,
        "rank": asked.rank,
        "owner": asked.owner,
        "pinned": bool(asked.pinned),
        "source": asked.source,
    }
    if found is not None:
        files = found.files
        fields |= {"rank": files.config.max_rank, "num_bytes": files.num_bytes, "digest": found.digest}
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
