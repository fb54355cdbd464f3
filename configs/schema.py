"""The shape of a profile. Frozen; an unknown key, a wrong type or an impossible value is an error naming the place.

Only the shape lives here: reading files, environment and flags is `configs.load`, checks across sections are
`configs.check`. Defaults are those of a single machine without a GPU.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from configs.adapters.sections import AdapterConfig as AdapterConfig
from configs.adapters.sections import AdapterFilesConfig as AdapterFilesConfig
from configs.adapters.sections import AdapterSourceConfig as AdapterSourceConfig
from configs.section import ModelId as ModelId
from configs.section import Name as Name
from configs.section import NotNegative, NotNegativeF, Port, Positive, PositiveF
from configs.section import Section as Section

ToolCallParser: TypeAlias = Literal[
    "auto", "none", "hermes", "deepseek_v3", "deepseek_v31", "ernie45", "glm45", "glm47", "granite", "granite4",
    "hunyuan_a13b", "internlm", "jamba", "json", "kimi_k2", "lfm2", "llama3_json", "llama4_json", "llama4_pythonic",
    "longcat", "mistral", "olmo3", "openai", "phi4_mini_json", "pythonic", "qwen3_coder", "qwen3_xml", "smollm2",
]  # fmt: skip
ReasoningParser: TypeAlias = Literal[
    "auto", "none", "deepseek_r1", "deepseek_v3", "ernie45", "glm45", "hunyuan_a13b", "kimi_k2", "minimax_m2",
    "mistral", "nemotron_v3", "olmo3", "openai_gptoss", "qwen3", "seed_oss", "step3",
]  # fmt: skip


class ModelConfig(Section, frozen=True):
    """A model that clients can name.

    `source`: a catalogue name (`warmgate models list`), a local folder, a hub id, or `sim:bytes` (a byte-level
    tokenizer and no weights, for the sim engine). `tool_call_parser` and `reasoning_parser`: how the model writes calls
    and thoughts, by vLLM's names; `auto` is what its chat template speaks of.
    """

    id: ModelId
    source: str
    aliases: tuple[ModelId, ...] = ()
    default_max_tokens: Positive = 4096
    route_block_tokens: Positive = 64
    tool_call_parser: ToolCallParser = "auto"
    reasoning_parser: ReasoningParser = "auto"


class SimConfig(Section, frozen=True):
    """The sim engine's clockwork: seconds a step takes, and what it pretends to hold.

    `adapter_load_s` is for rank 8 and grows with the rank, up to `max_adapter_rank`. Answers end at `max_tokens`, or,
    with `mean_output_tokens`, with end of sequence after that many tokens on average. Guesses of a pretended draft
    model come true with probability `draft_acceptance` each; checking one of any method takes `step_per_draft_s`.
    """

    prefill_tokens_per_s: PositiveF = 8000.0
    step_base_s: NotNegativeF = 0.006
    step_per_sequence_s: NotNegativeF = 0.00035
    num_blocks: Positive = 4096
    max_adapters: NotNegative = 0
    adapter_load_s: NotNegativeF = 0.5
    max_adapter_rank: Positive = 64
    max_model_len: Positive = 8192
    mean_output_tokens: Positive | None = None
    draft_acceptance: Annotated[float, Meta(ge=0, le=1)] = 0.7
    step_per_draft_s: NotNegativeF = 0.0001


class SpeculativeConfig(Section, frozen=True):
    """Speculative decoding: who guesses, and how far. vLLM's names where it has them.

    `ngram`: what followed the last tokens where they stood before. `lookahead`: the model itself, by Jacobi iteration.
    `draft_model`: a smaller model with the same vocabulary, `mlp_speculator`: heads on the model's last hidden state
    (`warmgate train-draft` makes both); `model` is a catalogue name, hub id or folder. `num_speculative_tokens` is the
    most a sequence gets in a step; unless `adaptive` is off, fewer or none as measurements advise.
    """

    method: Literal["ngram", "lookahead", "draft_model", "mlp_speculator"]
    num_speculative_tokens: Annotated[int, Meta(ge=1, le=32)] = 8
    model: str | None = None
    adaptive: bool = True
    prompt_lookup_min: Positive = 2
    prompt_lookup_max: Positive = 8
    lookahead_window: Annotated[int, Meta(ge=1, le=32)] = 5
    lookahead_ngram: Annotated[int, Meta(ge=2, le=8)] = 4
    lookahead_guesses: Annotated[int, Meta(ge=1, le=32)] = 5


class VllmConfig(Section, frozen=True):
    """What only vLLM has. `arguments`: any of its engine arguments by name, but for those that have a key of their own
    here and those that are dangerous (`configs.vllm_arguments`).

    On a CPU the KV cache has `engine.kv_cache_gib`, on GPUs vLLM's share of the memory, `gpu_memory_utilization`.
    `enforce_eager`: no compilation, no CUDA graphs; by default just on a CPU, where compiling takes minutes.
    """

    tensor_parallel_size: Positive = 1
    pipeline_parallel_size: Positive = 1
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] = 0.9
    enforce_eager: bool | None = None
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)


class UpstreamConfig(Section, frozen=True):
    """A server that runs already and speaks OpenAI's API. `model`: its name there, if not the first it lists.
    `kv_tokens`: what its prefix cache holds, where its metrics do not say."""

    url: str
    model: str | None = None
    api_key_env: str | None = None
    health_period_s: PositiveF = 1.0
    kv_tokens: Positive | None = None


Quantization: TypeAlias = Literal[
    "int8", "w8a8", "int4", "nf4", "bitsandbytes", "fp8", "awq", "gptq", "compressed-tensors", "gguf"
]


class EngineConfig(Section, frozen=True):
    """How a replica generates. `native` is the in-house engine, `vllm` is vLLM, `openai` a server that runs already
    (`upstream`); `sim` pretends, with the real scheduler and pool.

    `max_prefill_stall_s`: how much longer a step may take for the sake of others' prompts while answers are running;
    without it prompts get all of `max_num_batched_tokens`.

    `max_adapters` LoRA adapters are resident at most (0: none), as far as their ranks fit into `lora_pool_gib`. An
    adapter says what it was trained on: that must be a name of the model, or one of `lora_base_models`.

    `quantization`: of plain weights, what to round them to on loading (`int8`, `w8a8`, `int4`, `nf4` = `bitsandbytes`,
    `fp8`); of a quantised checkpoint its own method, which need not be said. `head_quantization: auto` rounds the head
    of a quantised model to int8 where compiled kernels make that faster. `kernels: none` compiles nothing and runs on
    torch's own operators.
    """

    kind: Literal["native", "vllm", "openai", "sim"] = "native"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    threads: Positive = 1
    block_size: Positive = 16
    kv_cache_gib: PositiveF = 1.0
    max_model_len: Positive | None = None
    max_num_seqs: Positive = 32
    max_num_batched_tokens: Positive = 512
    max_prefill_stall_s: PositiveF | None = None
    max_waiting: Positive = 1024
    max_adapter_loads: Positive = 2
    max_adapters: NotNegative = 0
    max_lora_rank: Annotated[int, Meta(ge=1, le=512)] = 64
    lora_pool_gib: PositiveF = 1.0
    lora_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    lora_base_models: tuple[str, ...] = ()
    prefix_caching: bool = True
    order: Literal["shortest", "fcfs", "priority", "deadline", "fair"] = "shortest"
    quantization: Quantization | None = None
    quantization_group_size: Literal[32, 64, 128, -1] = 64
    head_quantization: Literal["auto", "none", "int8"] = "auto"
    kv_cache_dtype: Literal["auto", "int8", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    kernels: Literal["auto", "none"] = "auto"
    structured: bool = True
    self_check: bool = True
    speculative: SpeculativeConfig | None = None
    vllm: VllmConfig = VllmConfig()
    upstream: UpstreamConfig | None = None
    sim: SimConfig = SimConfig()


class ResourcesConfig(Section, frozen=True):
    num_cpus: NotNegativeF = 1.0
    num_gpus: NotNegativeF = 0.0


class GroupConfig(Section, frozen=True):
    """Replicas that are the same: one model, one engine, one scale."""

    name: Name
    model: ModelId
    replicas: Positive = 1
    engine: EngineConfig = EngineConfig()
    resources: ResourcesConfig = ResourcesConfig()


class RoutingConfig(Section, frozen=True):
    """`warm`: least expected seconds to the first token. The others, to compare with: `routing.policies`."""

    policy: Literal[
        "warm",
        "round_robin",
        "random",
        "power_of_two",
        "least_outstanding",
        "chwbl",
        "cache_aware",
        "cache_aware_sglang",
        "prefix_affinity",
        "prefix_affinity_balanced",
        "overlap_cost",
        "greedy_ttft",
    ] = "warm"
    max_index_blocks: Positive = 4_194_304
    max_attempts: Positive = 3


class AdmissionConfig(Section, frozen=True):
    """Bounds of the fair queue at each ingress; beyond them requests get 429 with Retry-After.

    `look_ahead`: among how many of those who are next request and replica are chosen together; 0 = whoever is next goes
    as soon as any replica has a place. `max_ahead_per_replica` counts where a replica does not say what it wants.
    """

    max_queued: Positive = 1024
    max_queued_tokens: Positive = 4_000_000
    max_queued_bytes: Positive = 256 * 1024 * 1024
    max_wait_s: PositiveF = 120.0
    max_body_bytes: Positive = 8 * 1024 * 1024
    max_ahead_per_replica: Positive = 8
    look_ahead: Annotated[int, Meta(ge=0, le=64)] = 16


class TenantConfig(Section, frozen=True):
    """Who may ask. `key_sha256` are hex digests of API keys; `keys` are the keys themselves (development only).

    `anonymous: true` makes this the tenant of requests without a key; when no tenant has a key, also of requests with
    any key (OpenAI clients insist on sending one). `admin`: its keys may do what costs or changes more than answers do.
    """

    id: Name
    keys: tuple[str, ...] = ()
    key_sha256: tuple[Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")], ...] = ()
    anonymous: bool = False
    admin: bool = False
    weight: PositiveF = 1.0
    max_priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    models: tuple[ModelId, ...] = ()
    max_concurrent: Positive | None = None
    max_wait_s: PositiveF | None = None


class RedisConfig(Section, frozen=True):
    """`embedded` starts a private Valkey on a Unix socket; otherwise redis://, rediss:// or unix://."""

    url: str = "embedded"
    timeout_s: PositiveF = 0.25


class HttpConfig(Section, frozen=True):
    """`worker_id_header`: answers name their replica as `x-worker-id` too, the header of other routers."""

    host: str = "127.0.0.1"
    port: Port = 8000
    ingress_replicas: Positive = 1
    max_ongoing_requests: Positive = 4096
    keep_alive_s: PositiveF = 75.0
    docs: bool = True
    worker_id_header: bool = False


class RayConfig(Section, frozen=True):
    """`address: local` starts a private Ray for this instance; else `auto` or the address of a running cluster.

    `haproxy`: `auto` = on Linux where the wheel is installed. `object_store_mib` small: tokens do not travel there.
    """

    address: str = "local"
    haproxy: Literal["auto", "on", "off"] = "auto"
    object_store_mib: Positive = 100
    drain_s: PositiveF = 20.0


class ChannelConfig(Section, frozen=True):
    """`secret_env` names the variable holding the cluster secret; without it `warmgate serve` draws one a start.

    `round_trip_s`: how long after a replica said that it can take more it expects to have it.
    """

    secret_env: str = "WARMGATE_CLUSTER_SECRET"
    heartbeat_s: PositiveF = 0.5
    dead_after_s: PositiveF = 1.5
    round_trip_s: PositiveF = 0.02


class TelemetryConfig(Section, frozen=True):
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    usage_log: str | None = None


class Config(Section, frozen=True):
    """A whole profile. `cluster` prefixes every Redis key and names the instance's run folder."""

    models: Annotated[tuple[ModelConfig, ...], Meta(min_length=1)]
    groups: Annotated[tuple[GroupConfig, ...], Meta(min_length=1)]
    tenants: Annotated[tuple[TenantConfig, ...], Meta(min_length=1)]
    cluster: Name = "warmgate"
    adapters: tuple[AdapterConfig, ...] = ()
    adapter_sources: tuple[AdapterSourceConfig, ...] = ()
    adapter_files: AdapterFilesConfig = AdapterFilesConfig()
    routing: RoutingConfig = RoutingConfig()
    admission: AdmissionConfig = AdmissionConfig()
    redis: RedisConfig = RedisConfig()
    http: HttpConfig = HttpConfig()
    ray: RayConfig = RayConfig()
    channel: ChannelConfig = ChannelConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    def model_named(self, name: str) -> ModelConfig | None:
        """The model whose id or alias is `name`."""
        return next((m for m in self.models if name == m.id or name in m.aliases), None)
