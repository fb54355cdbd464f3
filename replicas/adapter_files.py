"""An adapter's files on their way to the engine: allowed, fetched and checked first, whichever engine it is."""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec

from configs.adapters.files import AdapterFiles, Fit
from configs.lora import LoraError
from replicas.contract import AdapterSpec, EngineError


class AdapterUnreachableError(EngineError):
    """Its files cannot be read now; that says nothing about the adapter."""


class Loads(Protocol):
    """Where adapters are loaded: an engine, or what stands before one."""

    async def load_adapter(self, adapter: AdapterSpec) -> None: ...

    async def unload_adapter(self, adapter_id: str) -> None: ...


class CheckedLoads:
    """Gives an engine adapters from folders of this machine only, sound as far as can be told without the engine."""

    def __init__(self, engine: Loads, files: AdapterFiles, fit: Fit) -> None:
        self._engine = engine
        self._files = files
        self._fit = fit

    async def load_adapter(self, adapter: AdapterSpec) -> None:
        """Raises EngineError; AdapterUnreachableError when it may be tried again."""
        if adapter.path:
            try:
                folder = await asyncio.to_thread(self._files.local, adapter.path, adapter.digest, self._fit)
            except LoraError as error:
                raise EngineError(str(error)) from error
            except OSError as error:
                raise AdapterUnreachableError(str(error)) from error
            adapter = msgspec.structs.replace(adapter, path=str(folder))
        await self._engine.load_adapter(adapter)

    async def unload_adapter(self, adapter_id: str) -> None:
        await self._engine.unload_adapter(adapter_id)
