"""Composes the in-house engine: files → description → weights → cache → runner → scheduler → core → thread."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from configs.catalogue import entry_for
from configs.runtime import home_dir
from configs.schema import EngineConfig
from replicas.contract import EngineError, EngineFacts
from replicas.engine.attention import KvCache, KvGeometry, block_bytes
from replicas.engine.block_pool import BlockPool
from replicas.engine.core import EngineCore
from replicas.engine.families import DecoderSpec, read_spec
from replicas.engine.kernels.build import load_kernels
from replicas.engine.kernels.library import Kernels
from replicas.engine.kernels.pointwise import KernelPointwise
from replicas.engine.limits import SchedulerConfig
from replicas.engine.loop import BuiltEngine, ThreadedEngine
from replicas.engine.lora.checkpoint import BaseModel
from replicas.engine.lora.setup import LoraPlace, make_store
from replicas.engine.model import Decoder
from replicas.engine.pointwise import Pointwise, TorchPointwise
from replicas.engine.quantization.linears import QuantisedLinears
from replicas.engine.quantization.opening import is_quantised, open_source
from replicas.engine.quantization.source import Dequantised
from replicas.engine.rope import rope_table
from replicas.engine.runner import TorchRunner
from replicas.engine.scheduler import Scheduler
from replicas.engine.self_check import CheckSubject, reference_logits, self_check
from replicas.engine.speculative.native import Target, load_method, make_speculator
from replicas.engine.structured.store import make_grammars
from replicas.engine.weights import WeightLoader, weight_bytes

logger = logging.getLogger(__name__)

# The KV cache leaves this share of the free memory to activations and to the rest of the machine.
_MEMORY_SHARE = 0.9

# Nats that the self-check allows on top where activations are rounded to 8 bits as well.
_ROUNDING = {"w8a8": 1.0, "compressed-tensors": 1.0}
_KV_ROUNDING = {"auto": 0.0, "int8": 0.25, "fp8": 0.75, "fp8_e4m3": 0.75, "fp8_e5m2": 1.5}

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def native_engine(
    model_dir: Path, config: EngineConfig, model_name: str, clock: Callable[[], float] = time.monotonic
) -> ThreadedEngine:
    """The in-house engine for a model folder. Nothing is read before `start`, which raises EngineError when the model
    is unknown or broken, does not fit, or fails its self-check."""
    return ThreadedEngine(lambda: build_engine(model_dir, config, model_name, clock), clock)


def build_engine(model_dir: Path, config: EngineConfig, model_name: str, clock: Callable[[], float]) -> BuiltEngine:
    """Loads and checks; run it in the thread that will step the engine: torch's thread count is a thread's own."""
    torch.set_num_threads(config.threads)
    spec = read_spec(model_dir)
    place = _place(spec, config)
    kernels = _kernels(model_dir, config, place)
    opened = open_source(model_dir, spec, config, kernels is not None)
    linears = QuantisedLinears(kernels, place.device)
    weights = WeightLoader(opened.source, spec, place.dtype, place.device, linears).load()
    base = BaseModel(spec, _names(model_dir, model_name, config))
    adapters = make_store(base, config, LoraPlace(place.device, place.dtype, kernels))
    method = load_method(config, spec, place.dtype, place.device)
    # On the CPU the pool's zeros take no memory before they are written; on a GPU they have taken theirs.
    promised = adapters.pool.num_bytes if adapters is not None and place.device.type == "cpu" else 0
    others = _Others(promised, method.block_bytes(config.block_size) if method else 0)
    room = _room(spec, config, place, others)
    turns = rope_table(spec.rope, spec.head_dim, room.max_len).to(place.device)
    geometry = KvGeometry.of(spec, config.block_size, place.dtype, place.device).storing(config.kv_cache_dtype)
    cache = KvCache(geometry, spec.num_layers, room.num_blocks, kernels)
    runner = TorchRunner(Decoder(spec, weights, turns, _pointwise(kernels)), cache, geometry, adapters)
    verdict = "skipped: switched off in the profile"
    if config.self_check:
        rounding = _ROUNDING.get(opened.method, 0.0) + _KV_ROUNDING[config.kv_cache_dtype]
        size = (room.num_blocks, config.block_size, room.max_len)
        subject = CheckSubject(runner, *size, place.dtype, rounding, kernels is not None)
        meant = Dequantised(opened.source, spec)
        reference = reference_logits(meant, spec, place.device, meant.inputs)
        verdict = self_check(subject, reference, spec.vocab_size)
    limits = SchedulerConfig.from_engine(config, room.max_len, spec.eos_token_ids)
    scheduler = Scheduler(limits, BlockPool(room.num_blocks, config.block_size), clock)
    grammars = make_grammars(config, tokenizer_json(model_dir), spec.vocab_size, spec.eos_token_ids)
    facts = EngineFacts(
        engine="native",
        model=model_name,
        vocab_size=spec.vocab_size,
        max_model_len=scheduler.max_len,
        block_size=config.block_size,
        num_blocks=room.num_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        eos_token_ids=spec.eos_token_ids,
        dtype=str(place.dtype).removeprefix("torch."),
        quantization=opened.method,
        weight_bytes=weight_bytes(weights),
        device=str(place.device),
        kv_cache_dtype=config.kv_cache_dtype,
        kv_bytes=room.num_blocks * block_bytes(spec, config.block_size, place.dtype, config.kv_cache_dtype),
        prefill_order=config.order,
        max_adapters=config.max_adapters,
        max_adapter_rank=0 if adapters is None else adapters.max_rank,
        adapter_pool_ranks=0 if adapters is None else adapters.pool.num_ranks,
        exact_resume=True,
        structured=grammars is not None,
        prompt_logprobs=True,
        events=config.prefix_caching,
        speculative=config.speculative.method if config.speculative else "",
        self_check=verdict,
    )
    speculator = make_speculator(method, config, Target(runner, weights.embedding, room.num_blocks, room.max_len))
    return BuiltEngine(EngineCore(scheduler, runner, clock, adapters, speculator), facts, grammars)


def _kernels(model_dir: Path, config: EngineConfig, place: _Place) -> Kernels | None:
    """The compiled kernels, where something here would use them: in bfloat16 only what is rounded and adapters do."""
    wanted = place.dtype == torch.float32 or is_quantised(model_dir, config) or config.kv_cache_dtype != "auto"
    if not (wanted or config.max_adapters > 0) or place.device.type != "cpu":
        return None
    if config.kernels == "none":
        logger.info("engine.kernels: none: everything runs on torch's own operators")
        return None
    return load_kernels(home_dir(os.environ) / "kernels", os.environ)


def _pointwise(kernels: Kernels | None) -> Pointwise:
    return TorchPointwise() if kernels is None else KernelPointwise(kernels)


def tokenizer_json(model_dir: Path) -> str | None:
    """A model folder's tokenizer, None when it has none."""
    path = model_dir / "tokenizer.json"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _names(model_dir: Path, model_name: str, config: EngineConfig) -> tuple[str, ...]:
    """What the model is called: in the profile, on this disk, in the catalogue."""
    entry = entry_for(model_dir.name)
    known = () if entry is None else (entry.name, entry.hub_id)
    return tuple(dict.fromkeys((model_name, str(model_dir), *known, *config.lora_base_models)))


@dataclass(frozen=True, slots=True)
class _Place:
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Others:
    """What needs memory beside the KV cache: bytes promised and still untouched, and bytes more for each block."""

    promised_bytes: int
    bytes_per_block: int


@dataclass(frozen=True, slots=True)
class _Room:
    """What the KV cache holds: blocks, and the longest context they and the model allow."""

    num_blocks: int
    max_len: int


def _place(spec: DecoderSpec, config: EngineConfig) -> _Place:
    """`auto` is the first GPU, else the CPU; there float32, since only that agrees token by token with a reference."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"unknown device {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"unknown device {name!r}: this engine runs on cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError(f"device {name!r}: torch finds no CUDA device")
    wanted: str = config.dtype
    if wanted == "auto":
        wanted = "float32" if device.type == "cpu" or spec.dtype not in _DTYPES else spec.dtype
    return _Place(device, _DTYPES[wanted])


def _room(spec: DecoderSpec, config: EngineConfig, place: _Place, others: _Others) -> _Room:
    """Blocks within the profile's budget, what is needed, and what fits now. Raises EngineError when too few."""
    max_len = config.max_model_len or spec.max_len
    if max_len > spec.max_len:
        raise EngineError(f"max_model_len {max_len} is beyond the model's context of {spec.max_len} tokens")
    size = block_bytes(spec, config.block_size, place.dtype, config.kv_cache_dtype) + others.bytes_per_block
    budget = int(config.kv_cache_gib * 2**30) // size
    needed = config.max_num_seqs * -(-max_len // config.block_size)
    fits = max(0, int(_free_bytes(place.device) * _MEMORY_SHARE) - others.promised_bytes) // size
    num_blocks = min(budget, needed, fits)
    num_tokens = num_blocks * config.block_size
    if num_blocks == 0 or (config.max_model_len is not None and num_tokens < max_len):
        raise EngineError(
            f"the KV cache holds {num_tokens} tokens and max_model_len asks for {max_len}: a block takes {size} bytes, "
            f"kv_cache_gib allows {budget} blocks and free memory {fits}"
        )
    return _Room(num_blocks, min(max_len, num_tokens))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
