"""Starts vLLM for a profile: environment, arguments, what the engine found about itself, and its end.

vLLM runs in processes of its own: the engine core, and below it a worker per device. `replicas.vllm.child` ends them
when this process is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from configs.schema import EngineConfig, SpeculativeConfig
from configs.vllm_arguments import refused
from replicas.contract import EngineError, EngineFacts
from replicas.vllm import child
from replicas.vllm.kv_subscription import KvSubscription
from replicas.vllm.versions import check_installed, version

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger(__name__)

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_SHUTDOWN_S = 5.0
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every replica pins itself to the same cores
    "VLLM_PLUGINS": "warmgate",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked process does not call plugins again
}
_DEFAULT_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENGINE_READY_TIMEOUT_S": "900"}


@dataclass(slots=True)
class Launched:
    """A running vLLM. `seeded_resume`: see `replicas.vllm.sampling.Rules`. `processes`: all below this one."""

    engine: AsyncLLM
    facts: EngineFacts
    seeded_resume: bool
    events: KvSubscription | None
    processes: tuple[psutil.Process, ...]
    folder: Path

    def cpu_s(self) -> float:
        """CPU seconds that vLLM's processes have used."""
        total = 0.0
        for process in self.processes:
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system
        return total

    def close(self) -> None:
        """Ends vLLM, its processes last. Blocks up to some seconds."""
        try:
            self.engine.shutdown(timeout=_SHUTDOWN_S)
        except Exception:  # it is going away: whatever it complains of, its processes must end
            logger.exception("vLLM did not shut down cleanly")
        finally:
            self.kill()
            if self.events is not None:
                self.events.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """Ends the processes at once."""
        for process in self.processes:
            try:
                process.kill()
            except psutil.Error:
                continue


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model folder, how it is to run, and what it is called."""

    path: Path
    config: EngineConfig
    name: str


def launch(wanted: Wanted) -> Launched:
    """Starts vLLM; a minute or more. Not on an event loop's thread. Raises EngineError."""
    check_installed()
    folder = Path(tempfile.mkdtemp(prefix="warmgate-vllm-"))
    events: KvSubscription | None = None
    try:
        _prepare(folder, wanted.config)
        if wanted.config.prefix_caching:
            events = KvSubscription(folder)
        engine = _build(wanted, events)
        processes = tuple(_processes(engine))
        launched = Launched(engine, _facts(engine, wanted), _is_seeded(engine), events, processes, folder)
        if events is not None:
            events.begin(launched.facts.block_size)
        return launched
    except BaseException as error:
        if events is not None:
            events.close()
        why = child.why(folder)
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, EngineError) or not isinstance(error, Exception):
            raise
        raise EngineError(f"vLLM did not start: {why or _reason(error)}") from error


def _processes(engine: AsyncLLM) -> Iterator[psutil.Process]:
    """The engine core and its workers: nothing else below this process is ours to end."""
    for core in engine.engine_core.resources.engine_manager.processes:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(core.pid)
            yield process
            yield from process.children(recursive=True)


def _prepare(folder: Path, config: EngineConfig) -> None:
    """This process's environment, which vLLM's processes inherit."""
    os.environ.update(_ENVIRONMENT)
    for name, value in _DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if config.vllm.pipeline_parallel_size == 1:  # stages of a pipeline may lie on several nodes
        os.environ["VLLM_HOST_IP"] = "127.0.0.1"
    os.environ[child.FOLDER] = str(folder)
    os.environ[child.VARIABLE] = child.mark()
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win over the profile


def _build(wanted: Wanted, events: KvSubscription | None) -> AsyncLLM:
    from vllm.config.kv_events import KVEventsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from replicas.vllm.quiet import Quiet

    arguments = arguments_of(wanted)
    if events is not None:
        arguments["kv_events_config"] = KVEventsConfig(
            enable_kv_cache_events=True,
            publisher="zmq",
            endpoint=events.endpoint,
            replay_endpoint=events.replay_endpoint,
        )
    try:
        args = AsyncEngineArgs(**arguments)
    except TypeError as error:
        raise EngineError(f"vLLM {version()} takes other arguments than this adapter gives: {error}") from error
    # A class that keeps Prometheus out of this process also makes the engine core count.
    return AsyncLLM.from_engine_args(args, stat_loggers=[Quiet])


def arguments_of(wanted: Wanted) -> dict[str, Any]:
    """vLLM's engine arguments, by its names. Raises EngineError for those of the profile that vLLM does not have."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    config, is_cpu = wanted.config, current_platform.is_cpu()
    known = set(AsyncEngineArgs.__dataclass_fields__)
    for name in config.vllm.arguments:
        reason = refused(name) or ("" if name.replace("-", "_") in known else f"vLLM {version()} has no such argument")
        if reason:
            raise EngineError(f"engine.vllm.arguments.{name}: {reason}")
    dtype = "float32" if config.dtype == "auto" and is_cpu else config.dtype
    arguments: dict[str, Any] = {
        "model": str(wanted.path),
        "dtype": dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enable_prefix_caching": config.prefix_caching,
        "quantization": config.quantization,
        "scheduling_policy": "fcfs" if config.order == "fcfs" else "priority",
        "seed": 0,
        "tensor_parallel_size": config.vllm.tensor_parallel_size,
        "pipeline_parallel_size": config.vllm.pipeline_parallel_size,
        "enforce_eager": is_cpu if config.vllm.enforce_eager is None else config.vllm.enforce_eager,
        "disable_log_stats": True,
        "enable_logging_iteration_details": True,
        "structured_outputs_config": {"backend": "guidance"},
        "language_model_only": True,
    }
    if is_cpu:
        arguments["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
        arguments["block_size"] = max(32, config.block_size)
    else:
        arguments["block_size"] = config.block_size
        arguments["gpu_memory_utilization"] = config.vllm.gpu_memory_utilization
    if config.kv_cache_dtype != "auto":
        arguments["kv_cache_dtype"] = config.kv_cache_dtype
    if config.max_adapters:
        # With as many slots as adapters, rows of the base model in a batch with adapters get the last slot's.
        arguments |= {
            "enable_lora": True,
            "max_loras": config.max_adapters + 1,
            "max_cpu_loras": config.max_adapters + 1,
        }
        arguments["max_lora_rank"] = next(rank for rank in _LORA_RANKS if rank >= config.max_lora_rank)
        arguments["lora_dtype"] = config.lora_dtype
    if config.speculative is not None:
        arguments["speculative_config"] = _speculative(config.speculative)
    return arguments | {name.replace("-", "_"): value for name, value in config.vllm.arguments.items()}


def _speculative(config: SpeculativeConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"method": config.method, "num_speculative_tokens": config.num_speculative_tokens}
    if config.method == "ngram":
        return found | {"prompt_lookup_min": config.prompt_lookup_min, "prompt_lookup_max": config.prompt_lookup_max}
    return found | {"model": config.model}


def _facts(engine: AsyncLLM, wanted: Wanted) -> EngineFacts:
    config: VllmConfig = engine.vllm_config
    model, cache, scheduler, asked = config.model_config, config.cache_config, config.scheduler_config, wanted.config
    has_adapters = asked.max_adapters > 0
    num_blocks = (cache.num_gpu_blocks or 1) - 1  # one is vLLM's own, for padding
    return EngineFacts(
        engine="vllm",
        model=wanted.name,
        vocab_size=model.get_vocab_size(),
        max_model_len=model.max_model_len,
        block_size=cache.block_size,
        num_blocks=num_blocks,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        eos_token_ids=_eos(engine),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=str(model.quantization or ""),
        kv_cache_dtype=str(cache.cache_dtype),
        device=str(config.device_config.device_type),
        prefill_order=asked.order,
        max_logprobs=model.max_logprobs,
        max_adapters=asked.max_adapters,
        max_adapter_rank=asked.max_lora_rank if has_adapters else 0,
        adapter_pool_ranks=asked.max_adapters * asked.max_lora_rank,
        exact_resume=False,
        structured=asked.structured,
        # With adapters, several requests at once that want logprobs of their prompts end the engine core.
        prompt_logprobs=not has_adapters,
        events=asked.prefix_caching,
        speculative=asked.speculative.method if asked.speculative else "",
    )


def _eos(engine: AsyncLLM) -> tuple[int, ...]:
    """The tokenizer's end of sequence, and what else `generation_config.json` says ends an answer."""
    found: list[int] = []
    main = engine.renderer.get_eos_token_id()
    if main is not None:
        found.append(main)
    others = engine.input_processor.generation_config_fields.get("eos_token_id") or []
    found += [others] if isinstance(others, int) else list(others)
    return tuple(dict.fromkeys(found))


def _is_seeded(engine: AsyncLLM) -> bool:
    """vLLM's second model runner keys noise by position; the first one's generator begins again with a request."""
    return bool(getattr(engine.vllm_config, "use_v2_model_runner", False))


def _reason(error: Exception) -> str:
    """What went wrong, in a line: vLLM's processes have told the rest on stderr."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]
