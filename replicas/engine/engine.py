"""Composes the in-house engine: files → description → weights → cache → runner → scheduler → core → thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from configs.schema import EngineConfig
from replicas.contract import EngineError, EngineFacts
from replicas.engine.attention import KvCache, KvGeometry, block_bytes
from replicas.engine.block_pool import BlockPool
from replicas.engine.core import EngineCore
from replicas.engine.families import DecoderSpec, read_spec
from replicas.engine.limits import SchedulerConfig
from replicas.engine.loop import BuiltEngine, ThreadedEngine
from replicas.engine.model import Decoder
from replicas.engine.rope import rope_table
from replicas.engine.runner import TorchRunner
from replicas.engine.scheduler import Scheduler
from replicas.engine.self_check import CheckSubject, reference_logits, self_check
from replicas.engine.weights import Checkpoint, WeightLoader

# The KV cache leaves this share of the free memory to activations and to the rest of the machine.
_MEMORY_SHARE = 0.9

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
    checkpoint = Checkpoint(model_dir)
    weights = WeightLoader(checkpoint, spec, place.dtype, place.device).load()
    room = _room(spec, config, place)
    turns = rope_table(spec.rope, spec.head_dim, room.max_len).to(place.device)
    geometry = KvGeometry.of(spec, config.block_size, place.dtype, place.device)
    runner = TorchRunner(Decoder(spec, weights, turns), KvCache(geometry, spec.num_layers, room.num_blocks), geometry)
    verdict = "skipped: switched off in the profile"
    if config.self_check:
        subject = CheckSubject(runner, room.num_blocks, config.block_size, room.max_len, place.dtype)
        verdict = self_check(subject, reference_logits(checkpoint, spec, place.device), spec.vocab_size)
    limits = SchedulerConfig.from_engine(config, room.max_len, spec.eos_token_ids)
    scheduler = Scheduler(limits, BlockPool(room.num_blocks, config.block_size), clock)
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
        device=str(place.device),
        kv_bytes=room.num_blocks * block_bytes(spec, config.block_size, place.dtype),
        prefill_order=config.order,
        exact_resume=True,
        prompt_logprobs=True,
        events=config.prefix_caching,
        self_check=verdict,
    )
    return BuiltEngine(EngineCore(scheduler, runner, clock), facts)


@dataclass(frozen=True, slots=True)
class _Place:
    device: torch.device
    dtype: torch.dtype


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


def _room(spec: DecoderSpec, config: EngineConfig, place: _Place) -> _Room:
    """Blocks within the profile's budget, what is needed, and what fits now. Raises EngineError when too few."""
    max_len = config.max_model_len or spec.max_len
    if max_len > spec.max_len:
        raise EngineError(f"max_model_len {max_len} is beyond the model's context of {spec.max_len} tokens")
    size = block_bytes(spec, config.block_size, place.dtype)
    budget = int(config.kv_cache_gib * 2**30) // size
    needed = config.max_num_seqs * -(-max_len // config.block_size)
    fits = int(_free_bytes(place.device) * _MEMORY_SHARE) // size
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
