"""LoRA adapters in vLLM: one request to it per adapter, with an id of its own that is never used again.

vLLM tells prefix caches apart by an adapter's name and path, so the name it gets is `name@version`. It would also load
an adapter that it does not hold in the middle of a step; here it is always told to before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from replicas.contract import AdapterSpec, EngineError
from replicas.vllm.adapter_files import look_at

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

Ask = Callable[[Awaitable[Any]], Awaitable[Any]]
"""Waits for an answer of the engine core, or for its death (EngineDeadError)."""


class VllmAdapters:
    """What is loaded, by `name@version`. The caller sees to it that slots suffice."""

    def __init__(self, core: Any, ask: Ask, max_rank: int) -> None:
        self._core = core
        self._ask = ask
        self._max_rank = max_rank
        self._loaded: dict[str, LoRARequest] = {}
        self._next_id = 1

    def named(self, adapter_id: str | None) -> LoRARequest | None:
        """Raises KeyError for one that is not loaded."""
        return None if adapter_id is None else self._loaded[adapter_id]

    def __contains__(self, adapter_id: str) -> bool:
        return adapter_id in self._loaded

    async def load(self, adapter: AdapterSpec) -> None:
        """Raises EngineError when vLLM cannot load it; then nothing has changed."""
        from vllm.lora.request import LoRARequest

        if adapter.adapter_id in self._loaded:
            return
        folder = await asyncio.to_thread(look_at, adapter, self._max_rank)
        request = LoRARequest(adapter.adapter_id, self._next_id, str(folder))
        self._next_id += 1
        try:
            await self._ask(self._core.add_lora_async(request))
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM could not load adapter {adapter.adapter_id}: {_reason(error)}") from error
        self._loaded[adapter.adapter_id] = request

    async def unload(self, adapter_id: str) -> None:
        """No-op for one that is not loaded. Requests must not use it any more."""
        request = self._loaded.pop(adapter_id, None)  # first, so that no request for it can be on its way
        if request is None:
            return
        try:
            await self._ask(self._core.remove_lora_async(request.lora_int_id))
        except EngineError:
            self._loaded[adapter_id] = request
            raise


def _reason(error: Exception) -> str:
    """vLLM's last line says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
