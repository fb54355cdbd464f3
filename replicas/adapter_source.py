"""Where a replica learns what an adapter's name stands for."""

from __future__ import annotations

import contextlib
from typing import Protocol

from replicas.contract import AdapterSpec
from routing.adapters import AdapterWatch
from routing.store import StoreError


class AdapterSource(Protocol):
    """Descriptions of adapters by `name@version`."""

    def find(self, adapter_id: str) -> AdapterSpec | None:
        """From memory."""
        ...

    async def refresh(self) -> None:
        """Looks for news; raises nothing when there is nobody to ask."""
        ...


class CatalogueSource:
    """The shared catalogue as an `AdapterSource`."""

    def __init__(self, watch: AdapterWatch) -> None:
        self._watch = watch

    def find(self, adapter_id: str) -> AdapterSpec | None:
        adapter = self._watch.catalogue.find(adapter_id)
        if adapter is None:
            return None
        return AdapterSpec(adapter_id=adapter_id, path=adapter.path, rank=adapter.rank, num_bytes=adapter.num_bytes)

    async def refresh(self) -> None:
        with contextlib.suppress(StoreError):
            await self._watch.refresh()
