"""What a group must not ask of vLLM: settings that only the in-house engine has, and arguments that are refused."""

from __future__ import annotations

from collections.abc import Iterator

from configs.errors import KeyPath
from configs.schema import EngineConfig
from configs.vllm_arguments import refused

_OF_NATIVE = ("max_prefill_stall_s", "kernels", "head_quantization", "quantization_group_size", "lora_pool_gib")
_ON_LOADING = ("int8", "w8a8", "int4", "nf4", "gguf")
_METHODS = ("ngram", "draft_model")


def unfit_for_vllm(engine: EngineConfig) -> Iterator[tuple[KeyPath, str]]:
    """(key within the engine, reason)."""
    plain = EngineConfig()
    for name in _OF_NATIVE:
        if getattr(engine, name) != getattr(plain, name):
            yield (name,), "only the native engine has it, not vllm"
    if engine.quantization in _ON_LOADING:
        reason = f"vllm does not round to {engine.quantization} on loading; it reads fp8, awq, gptq, compressed-tensors"
        yield ("quantization",), reason
    if engine.kv_cache_dtype == "int8":
        yield ("kv_cache_dtype",), "vllm has no int8 cache here; it has fp8"
    if engine.device not in ("auto", "cpu", "cuda"):
        yield ("device",), f"vllm takes the devices Ray gives it: auto, got {engine.device!r}"
    if engine.speculative is not None and engine.speculative.method not in _METHODS:
        reason = f"vllm has {' and '.join(_METHODS)}, got {engine.speculative.method}"
        yield ("speculative", "method"), reason
    for name in engine.vllm.arguments:
        why = refused(name)
        if why:
            yield ("vllm", "arguments", name), why
