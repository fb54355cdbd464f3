"""Where a replica learns what an adapter's name stands for."""

from __future__ import annotations

import contextlib
from typing import Protocol

from replicas.contract import AdapterSpec
from routing.adapter_watch import AdapterWatch
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
        catalogue = self._watch.catalogue
        adapter = catalogue.find(adapter_id)
        if adapter is None:
            return None
        current = catalogue.named(adapter.name)  # none while the first of a name is being tried
        return AdapterSpec(
            adapter_id=adapter_id,
            path=adapter.path,
            rank=adapter.rank,
            num_bytes=adapter.num_bytes,
            digest=adapter.digest,
            pinned=adapter.pinned and current in (None, adapter),  # one that was replaced need not be kept
        )

    async def refresh(self) -> None:
        with contextlib.suppress(StoreError):
            await self._watch.refresh()
