"""Servers that speak OpenAI's API, and what each can do beyond it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True, slots=True)
class Flavour:
    """`extras`: our sampling fields beyond OpenAI's → their names there. `gauges`: running, waiting and KV usage in its
    /metrics. `token_ids`: answers carry them when asked, in text and in logprobs."""

    name: str
    extras: Mapping[str, str] = field(default_factory=dict)
    gauges: tuple[str, str, str] | None = None
    token_ids: bool = False
    structured: bool = False


_COMMON = ("top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "skip_special_tokens")
VLLM = Flavour(
    "vllm",
    {name: name for name in (*_COMMON, "include_stop_str_in_output")},
    ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    token_ids=True,
    structured=True,
)
SGLANG = Flavour(
    "sglang",
    {name: name for name in _COMMON},
    ("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:token_usage"),
)
LLAMA_CPP = Flavour(
    "llama.cpp",
    {"top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repeat_penalty", "ignore_eos": "ignore_eos"},
    ("llamacpp:requests_processing", "llamacpp:requests_deferred", "llamacpp:kv_cache_usage_ratio"),
)
TENSORRT_LLM = Flavour("tensorrt-llm", {name: name for name in (*_COMMON, "include_stop_str_in_output")})
OPENAI = Flavour("openai")

_OWNERS = {"vllm": VLLM, "sglang": SGLANG, "llamacpp": LLAMA_CPP, "tensorrt_llm": TENSORRT_LLM}
"""What `owned_by` of a model says where nobody has changed it."""

_PROBES = (("/get_model_info", "model_path", SGLANG), ("/props", "default_generation_settings", LLAMA_CPP))
"""(path, a key of its answer, who answers so)."""


async def flavour_of(client: httpx.AsyncClient, card: Mapping[str, Any]) -> Flavour:
    """Which server this is: by what `/v1/models` says of a model, else by the routes that only one has."""
    owner = _OWNERS.get(str(card.get("owned_by", "")))
    if owner is not None:
        return owner
    for path, key, flavour in _PROBES:
        with contextlib.suppress(httpx.HTTPError, ValueError):
            reply = await client.get(path, timeout=10.0)
            found = reply.json() if reply.status_code == httpx.codes.OK else None
            if isinstance(found, dict) and key in found:
                return flavour
    return OPENAI


@dataclass(frozen=True, slots=True)
class Gauges:
    """What a server says of its load. `usage`: of its KV cache, 0 to 1."""

    num_running: int = 0
    num_waiting: int = 0
    usage: float = 0.0


def read_gauges(text: str, names: tuple[str, str, str]) -> Gauges:
    """From Prometheus' text format; over all models and ranks. Raises ValueError when it is something else."""
    totals = dict.fromkeys(names, 0.0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in totals:
                totals[sample.name] += sample.value
    running, waiting, usage = (totals[name] for name in names)
    return Gauges(int(running), int(waiting), min(1.0, usage))


def kv_tokens(text: str) -> int | None:
    """How many tokens vLLM's cache holds, if its metrics say so."""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "vllm:cache_config_info":
                blocks, size = sample.labels.get("num_gpu_blocks", ""), sample.labels.get("block_size", "")
                if blocks.isdigit() and size.isdigit():
                    return int(blocks) * int(size)
    return None
