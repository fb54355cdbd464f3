"""The adapters of one engine: read beside the steps, put into use between two of them.

any thread:    read ─► check ─► take pages ─► write them ─► install      (pages that no step uses yet)
engine thread:                                  install, unload, rows
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from configs.schema import EngineConfig
from replicas.contract import AdapterSpec, EngineError
from replicas.engine.lora.checkpoint import BaseModel, CheckedLora, check_lora
from replicas.engine.lora.rows import LoraRows, Placed, RowSorter, Span


class LoraStore:
    """`replicas.engine.core.AdapterStore` on a pool. At most `config.max_adapters` at once, each of at most
    `config.max_lora_rank`."""

    def __init__(self, sorter: RowSorter, base: BaseModel, config: EngineConfig) -> None:
        self.pool = sorter.pool
        self.max_adapters = config.max_adapters
        self.max_rank = config.max_lora_rank
        self._sorter = sorter
        self._base = base
        self._placed: OrderedDict[str, Placed] = OrderedDict()
        self._last: tuple[Sequence[Span], LoraRows] | None = None

    @property
    def resident(self) -> tuple[str, ...]:
        """Least recently used first."""
        return tuple(self._placed)

    def read(self, adapter: AdapterSpec) -> Callable[[], None]:
        """See `AdapterStore.read`: nothing is in use before the returned function is called."""
        lora = check_lora(adapter, self._base)
        if lora.rank > self.max_rank:
            raise EngineError(f"its rank is {lora.rank}, engine.max_lora_rank {self.max_rank}")
        pages = self.pool.take(lora.rank)
        try:
            self._write(lora, pages)
        except BaseException:
            self.pool.give_back(pages)
            raise
        return lambda: self._install(adapter.adapter_id, Placed(pages, lora.ranks))

    def unload(self, adapter_id: str) -> None:
        """Gives an adapter's pages back; no-op when it has none. No request may use it."""
        placed = self._placed.pop(adapter_id, None)
        self._last = None
        if placed is not None:
            self.pool.give_back(placed.pages)

    def rows(self, spans: Sequence[Span]) -> LoraRows | None:
        """The part of a step that has adapters; None when none has. Raises KeyError for one that is not resident."""
        if self._last is not None and self._last[0] == spans:  # a step like the last one: the same answers go on
            return self._last[1]
        used: dict[str, Placed] = {}
        for span in spans:
            if span.adapter_id is not None and span.adapter_id not in used:
                used[span.adapter_id] = self._placed[span.adapter_id]
        if not used:
            return None
        for adapter_id in used:
            self._placed.move_to_end(adapter_id)
        rows = self._sorter.sort(spans, used)
        self._last = (spans, rows)
        return rows

    def check(self) -> None:
        """Asserts every invariant, while nothing is being read; for tests."""
        assert len(self._placed) <= self.max_adapters
        self.pool.check([placed.pages for placed in self._placed.values()])

    def _install(self, adapter_id: str, placed: Placed) -> None:
        if adapter_id in self._placed or len(self._placed) >= self.max_adapters:
            self.pool.give_back(placed.pages)
        if adapter_id in self._placed:
            return  # a version names one set of weights for ever
        if len(self._placed) >= self.max_adapters:
            raise EngineError(f"no slot is free for {adapter_id}: {self.max_adapters} are taken")
        self._placed[adapter_id] = placed

    @torch.inference_mode()
    def _write(self, lora: CheckedLora, pages: Sequence[int]) -> None:
        """Copies every value once. Raises EngineError for values that the pool's type cannot hold."""
        pool = self.pool
        for found in lora.matrices():
            at = torch.tensor(pages[: found.a.shape[0]], device=pool.device)
            places = pool.layers[found.target][found.layer].matrices
            for place, values in zip(places, (found.a, *found.b), strict=True):
                stored = values.to(pool.dtype)
                if stored.dtype != values.dtype and not torch.isfinite(stored).all():
                    raise EngineError(f"values of {found.target} in layer {found.layer} are too large for {pool.dtype}")
                place.index_copy_(0, at, stored.to(pool.device))
