"""An engine's adapter store, as its profile wants it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from configs.schema import EngineConfig
from replicas.contract import EngineError
from replicas.engine.kernels.library import Kernels
from replicas.engine.lora.checkpoint import BaseModel
from replicas.engine.lora.compiled import Compiled, agrees
from replicas.engine.lora.layout import shapes_of
from replicas.engine.lora.pool import LoraPool, PoolPlan, page_bytes
from replicas.engine.lora.product import ShortProducts, pick_short
from replicas.engine.lora.rows import RowSorter
from replicas.engine.lora.store import LoraStore

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoraPlace:
    """Where an engine computes, in which type, and its compiled kernels where it has some."""

    device: torch.device
    dtype: torch.dtype
    kernels: Kernels | None


def make_store(base: BaseModel, config: EngineConfig, place: LoraPlace) -> LoraStore | None:
    """The store of an engine; None where the profile wants no adapters.

    Raises EngineError when the pool could not hold one adapter of the largest rank allowed.
    """
    if config.max_adapters == 0:
        return None
    kept = DTYPES.get(config.lora_dtype, place.dtype)
    shapes = shapes_of(base.spec)
    size = page_bytes(shapes, base.spec.num_layers, kept)
    budget = int(config.lora_pool_gib * 2**30) // size - 1
    if budget < config.max_lora_rank:
        raise EngineError(
            f"lora_pool_gib {config.lora_pool_gib} holds ranks of {budget} together and max_lora_rank is "
            f"{config.max_lora_rank}: a rank takes {size} bytes"
        )
    num_pages = 1 + min(budget, config.max_adapters * config.max_lora_rank)
    pool = LoraPool(shapes, PoolPlan(base.spec.num_layers, num_pages, kept, place.device))
    return LoraStore(RowSorter(pool, _short(place, kept)), base, config)


def _short(place: LoraPlace, kept: torch.dtype) -> ShortProducts:
    if place.kernels is not None and place.device.type == "cpu":
        compiled = Compiled(place.kernels, place.dtype, kept)
        if agrees(compiled, place.dtype, kept):
            return compiled
        logger.error("compiled low-rank products are wrong on this machine: torch's own are used")
    return pick_short(place.dtype, kept, place.device)
