"""Whether a replica fits on its GPUs: weights, KV cache, activations and CUDA graphs against the card.

    card × share = weights / devices + activations + graphs + KV cache           share: gpu_memory_utilization

What vLLM measures by a trial run is reckoned here from the model's shape, roughly and on the safe side, before anything
is started: activations of the largest batch through one MLP, float32 logits of every sequence, a GiB for CUDA graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from configs.schema import GroupConfig, ModelConfig
from configs.tokenizer import find_model
from ops.memory import GIB, Estimate, ModelShape, draft_shape

CONTEXT_BYTES = 600 << 20
"""The CUDA context, cuBLAS and NCCL: outside of vLLM's share."""

GRAPHS_BYTES = 1 << 30
WORKSPACE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU. `num_bytes`: all of its memory."""

    num_bytes: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """Bytes on each card of a replica, and tokens of KV cache that they leave room for in all."""

    weights: int
    activations: int
    graphs: int
    room: int
    kv_bytes_per_token: int

    @property
    def kv_tokens(self) -> int:
        return max(0, self.room) // self.kv_bytes_per_token


def needs_gpu(group: GroupConfig) -> bool:
    """Whether a group's replicas run on GPUs."""
    return group.engine.device != "cpu" and (num_devices(group) > 1 or group.resources.num_gpus > 0)


def num_devices(group: GroupConfig) -> int:
    """Cards of one replica."""
    if group.engine.kind != "vllm":
        return 1
    return group.engine.vllm.tensor_parallel_size * group.engine.vllm.pipeline_parallel_size


def plan(group: GroupConfig, shape: ModelShape, card: Card, drafter: ModelShape | None = None) -> GpuPlan:
    """The arithmetic for one card of a replica. `drafter`: a model that guesses beside it, from the same KV cache."""
    engine, devices = group.engine, num_devices(group)
    tensor, pipeline = engine.vllm.tensor_parallel_size, engine.vllm.pipeline_parallel_size
    dtype = "bfloat16" if engine.dtype == "auto" and shape.dtype not in ("float16", "bfloat16") else engine.dtype
    weights = shape.weights_in(dtype, engine.quantization) // devices
    weights += shape.lora_bytes(engine, dtype) // devices if engine.max_adapters else 0
    weights += drafter.weights_in(dtype) // tensor if drafter else 0  # in one stage of a pipeline
    batch = engine.max_num_batched_tokens * (2 * shape.intermediate_size // tensor + 4 * shape.hidden_size) * 2
    logits = 3 * engine.max_num_seqs * shape.vocab_size * 4
    eager = engine.vllm.enforce_eager if engine.kind == "vllm" else False
    graphs = 0 if eager else GRAPHS_BYTES
    share = engine.vllm.gpu_memory_utilization if engine.kind == "vllm" else 1.0
    budget = int(min(card.num_bytes * share, card.num_bytes - CONTEXT_BYTES))
    activations = batch + logits + WORKSPACE_BYTES
    room = budget - weights - activations - graphs
    a_token = shape.kv_bytes_per_token(dtype, engine.kv_cache_dtype)
    heads_split = min(tensor, shape.num_kv_heads)  # more cards than KV heads hold copies
    on_card = a_token // heads_split // pipeline
    if drafter:
        on_card += drafter.kv_bytes_per_token(dtype, engine.kv_cache_dtype) // min(tensor, drafter.num_kv_heads)
    return GpuPlan(weights, activations, graphs, room, max(1, on_card))


def group_on_card(group: GroupConfig, model: ModelConfig, home: Path, card: Card) -> Estimate:
    """Whether the longest request fits beside the weights, and what would fit. Raises ConfigError when the model's
    files cannot be read."""
    shape = ModelShape.read(find_model(model.source, home))
    drafter = draft_shape(group.engine, home)
    found = plan(group, shape, card, drafter)
    longest = min(group.engine.max_model_len or shape.max_model_len, shape.max_model_len)
    of = f"{num_devices(group)} x " if num_devices(group) > 1 else ""
    detail = (
        f"{of}{card.num_bytes / GIB:.0f} GiB: weights {found.weights / GIB:.2f}, activations "
        f"{found.activations / GIB:.2f}, graphs {found.graphs / GIB:.2f}, KV {max(0, found.room) / GIB:.2f} GiB a card "
        f"= {found.kv_tokens:,} tokens"
    )
    if found.kv_tokens >= longest:
        at_once = found.kv_tokens // longest
        return Estimate(0, "ok", f"{detail} (longest request {longest:,}: {at_once} at once)")
    return Estimate(
        0, "fail", f"{detail}, fewer than one request of {longest:,}", _advice(group, shape, card, longest, drafter)
    )


def _advice(group: GroupConfig, shape: ModelShape, card: Card, longest: int, drafter: ModelShape | None) -> str:
    """The smallest changes that make it fit."""
    found = plan(group, shape, card, drafter)
    ways: list[str] = []
    if found.kv_tokens >= 512:
        ways.append(f"engine.max_model_len {found.kv_tokens // 256 * 256} at most")
    for devices in (2, 4, 8):
        if group.engine.kind == "vllm" and devices > num_devices(group):
            wider = _with_tensor_parallel(group, devices)
            if plan(wider, shape, card, drafter).kv_tokens >= longest:
                ways.append(f"engine.vllm.tensor_parallel_size {devices}")
                break
    if group.engine.kv_cache_dtype == "auto" and found.kv_tokens * 2 >= longest:
        ways.append("engine.kv_cache_dtype fp8")
    missing = (longest - found.kv_tokens) * found.kv_bytes_per_token if found.room > 0 else -found.room
    ways.append(f"cards with {(card.num_bytes + missing) / GIB / 0.9:.0f} GiB or more")
    return "what would fit: " + ", or ".join(ways)


def _with_tensor_parallel(group: GroupConfig, devices: int) -> GroupConfig:
    vllm = replace(group.engine.vllm, tensor_parallel_size=devices, pipeline_parallel_size=1)
    return replace(group, engine=replace(group.engine, vllm=vllm))
