"""The contract between the gateway and any engine.

An engine turns token ids into token ids. Everything that crosses the channel is a `msgspec.Struct` of this module;
token ids travel packed (uint32, little endian) from the tokeniser to the engine and are never lists on the way.

    start(sink) ─► submit(GenerateRequest) … ─► sink([StepDelta, …]) once per engine step ─► exactly one terminal delta

The sink, rather than one iterator per request, is what lets all deltas of a step leave in one frame
(docs/decisions/0002-step-sink.md); `replicas.local.stream` gives the iterator where one is handier.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Protocol, TypeAlias

import msgspec
from msgspec import Meta

from configs.grammars.source import GrammarSource

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]
"""stop: EOS, stop string, stop token, or a constraint that allows no more. length: max_tokens or context's end. abort:
cancelled. error: see `fault`."""


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Packs token ids as uint32 little endian; raises OverflowError for an id outside 0..2^32-1."""
    return array("I", token_ids).tobytes()


def unpack_tokens(packed: bytes) -> array[int]:
    """The inverse of `pack_tokens`."""
    tokens = array("I")
    tokens.frombytes(packed)
    return tokens


class Constraint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the text of an answer must match, whole. `param` is the client's field that asked for it, to be named in
    errors."""

    source: GrammarSource
    param: str = "response_format"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to pick tokens. OpenAI's and vLLM's names and meanings; every bound was checked at the gateway.

    `temperature` 0 is greedy. `seed` is always set (the gateway draws one): noise is keyed (seed, output position),
    so a resumed request draws what it would have drawn. `logprobs` = how many alternatives besides the sampled token
    (0 = the sampled one alone, None = no logprobs). `prompt_logprobs` likewise for prompt tokens (echo scoring).
    `constraint` bans tokens before temperature and truncation; logprobs stay those of the model.
    `max_tokens` counts produced tokens, those of `GenerateRequest.produced` included.
    """

    max_tokens: int
    seed: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to generate (n > 1 is n requests).

    `request_id` is unique per replica connection together with `attempt`: a retry elsewhere is a new attempt, and
    frames of an older one are dropped. `prompt` and `produced` are packed ids; `produced` holds tokens an earlier
    attempt already delivered (primes penalties, min_tokens, stops; is never delivered again).
    `fair_tag` is the tenant's virtual start time, `fair_weight` its share, `priority` a band (lower is sooner),
    `deadline_s` the seconds left when sent. `num_uncached`: prompt tokens that its sender believes no cache here holds.
    `salt` separates prefix caches; `adapter` is `name@version`.
    """

    request_id: str
    prompt: bytes
    sampling: SamplingParams
    attempt: int = 1
    produced: bytes = b""
    adapter: str | None = None
    tenant: str = ""
    fair_tag: float = 0.0
    fair_weight: Annotated[float, Meta(gt=0)] = 1.0
    priority: int = 0
    deadline_s: float | None = None
    num_uncached: Annotated[int, Meta(ge=1)] | None = None
    salt: bytes = b""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt) // 4


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position: natural log, of the model's raw distribution (before penalties and
    temperature, as vLLM and OpenAI report). `top` is sorted, most likely first: (token id, logprob)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Fault(msgspec.Struct, frozen=True, array_like=True):
    """Why a request ended in error: a stable `code` (see `FAULT_CODES`), words for the user, whether another replica
    may try it, and when it has a chance here, where that is known."""

    code: str
    message: str
    retryable: bool = False
    param: str | None = None
    retry_after_s: float | None = None


FAULT_CODES = frozenset(
    {
        "context_length_exceeded",  # prompt (plus produced) can never fit this engine
        "unsupported_parameter",  # a capability `EngineFacts` says is missing
        "adapter_not_found",
        "adapter_loading",  # it will be there, but after the request's deadline
        "adapter_slots_busy",  # the same, because every slot is in use
        "adapter_unreachable",  # its files cannot be read now
        "invalid_grammar",  # a constraint that cannot be compiled
        "grammar_too_complex",  # a constraint beyond the bounds on time and memory, when compiled or when followed
        "overloaded",  # the engine's own waiting queue is full
        "draining",
        "deadline_exceeded",
        "engine_dead",
        "upstream_lost",  # the server that a replica speaks for broke off; the replica lives
        "internal",
    }
)


class StepDelta(msgspec.Struct, array_like=True, omit_defaults=True):
    """What one step produced for one request. `text` may lag behind `token_ids` (half characters, possible stops).

    The first delta of a request carries `num_cached_tokens` (prompt tokens served from the prefix cache) and, when
    asked for, `prompt_logprobs` (None for position 0). A delta with `finish_reason` is the last one. `adapter_wait_s`:
    in the first, how long the request waited for its adapter to be loaded.
    """

    request_id: str
    attempt: int = 1
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    fault: Fault | None = None
    adapter_wait_s: float = 0.0


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine found about itself at start: limits and abilities. Returned, never written back to a config.

    `max_adapters` LoRA adapters can be resident, each of `max_adapter_rank` at most, as long as their ranks sum to at
    most `adapter_pool_ranks`. `speculative` is the method of speculative decoding, if any, `quantization` that of the
    weights; `kv_cache_dtype` what keys and values are stored as.
    """

    engine: str
    model: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = ""
    quantization: str = ""
    weight_bytes: int = 0
    kv_cache_dtype: str = ""
    device: str = ""
    kv_bytes: int = 0
    prefill_order: str = "fcfs"
    max_logprobs: int = 20
    max_adapters: int = 0
    max_adapter_rank: int = 0
    adapter_pool_ranks: int = 0
    exact_resume: bool = False
    structured: bool = False
    prompt_logprobs: bool = False
    events: bool = False
    speculative: str = ""
    self_check: str = "skipped"

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size


class AdapterLoadStats(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Loads of adapters since the start. `seconds` all took together; `buckets`: how many took at most as long as each
    of `ADAPTER_LOAD_BUCKETS_S`, and all, not cumulated."""

    seconds: float = 0.0
    buckets: tuple[int, ...] = ()
    num_failed: int = 0
    num_evicted: int = 0


ADAPTER_LOAD_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A replica's load now; pushed with each step frame. Rates are learnt (exponential means), 0 = not known yet.

    `num_waiting_tokens`: prompt tokens not yet computed, of waiting and partly prefilled requests.
    `step_time_s`: mean wall time of a step that had only decodes. `num_steps` grows while there is progress.
    `waiting_sizes`: those prompts by size: bucket i holds (number, tokens) of the prompts with 2^i to 2^(i+1) - 1
    tokens left to compute; trailing empty buckets are left out.
    `kv_seq`: the `seq` that the next KV event will have, so that readers of the events know how far behind they are.
    `num_waiting_adapter`: of the waiting, those whose adapter is not resident yet. `adapters` are: usable at once.
    `loading`: those being loaded or queued for it, with the estimated seconds left. `adapter_queue_s`: seconds before a
    load asked for now could begin (loaders busy, slots all in use); `adapter_load_s`: learnt seconds such a load takes,
    for rank 8.
    `wanted_tokens`: prompt tokens it wants pending before a newcomer, so as never to idle while an ingress hears of it
    and answers, and no more; 0 = it does not say. `num_places`: requests it can take beyond those counted here, if it
    says what it wants. `num_unseen`: of the waiting, those that came during the step under way.
    `num_drafts` chains or trees of guesses were checked, with `num_draft_tokens` tokens, of which
    `num_accepted_tokens` came true: in all, and by position behind the last known token.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    step_time_s: float = 0.0
    adapters: tuple[str, ...] = ()
    draining: bool = False
    waiting_sizes: tuple[tuple[int, int], ...] = ()
    num_waiting_adapter: int = 0
    loading: tuple[tuple[str, float], ...] = ()
    adapter_load_s: float = 0.0
    adapter_queue_s: float = 0.0
    kv_seq: int = 0
    wanted_tokens: int = 0
    num_places: int = 0
    num_unseen: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_by_position: tuple[int, ...] = ()
    adapter_loads: AdapterLoadStats | None = None


class AdapterSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter: `adapter_id` is `name@version`, `rank` its low-rank dimension, `num_bytes` its size on disk,
    `digest` (`configs.lora`) that of its files when it was added, empty where nobody looked. One that is `pinned` keeps
    its slot."""

    adapter_id: str
    path: str = ""
    rank: int = 8
    num_bytes: int = 0
    digest: str = ""
    pinned: bool = False


class BlocksStored(msgspec.Struct, frozen=True, tag="stored", array_like=True):
    """Full KV blocks that entered the prefix cache, in prefix order. Ids are the engine's own (opaque, never reused
    within an `epoch`); `parent_id` is the block before the first one, None at a root. `namespace`: `cache_namespace`.
    `seq` counts an engine's events from 0 without a gap; an engine that loses some clears and stores anew."""

    seq: int
    block_ids: tuple[int, ...]
    parent_id: int | None
    token_ids: bytes
    namespace: str


class BlocksEvicted(msgspec.Struct, frozen=True, tag="evicted", array_like=True):
    seq: int
    block_ids: tuple[int, ...]


class CacheCleared(msgspec.Struct, frozen=True, tag="cleared", array_like=True):
    seq: int


KvEvent: TypeAlias = BlocksStored | BlocksEvicted | CacheCleared


def cache_namespace(adapter: str | None, salt: bytes) -> str:
    """What separates prefix caches inside an engine, which has one model."""
    return f"{adapter or ''}|{salt.hex()}"


def split_cache_namespace(namespace: str) -> tuple[str | None, bytes]:
    """The inverse of `cache_namespace`: adapter, salt. Raises ValueError for anything else."""
    adapter, _, salt = namespace.rpartition("|")
    return adapter or None, bytes.fromhex(salt)


StepSink: TypeAlias = Callable[[Sequence[StepDelta]], None]
"""Called once per engine step, on the event loop's thread, with every delta of that step."""


class EngineError(Exception):
    """Root of what engines raise."""


class RefusedError(EngineError):
    """`submit` will never run this request here; nothing was started."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class EngineDeadError(EngineError):
    """The engine stopped; every open request has had a terminal delta with code `engine_dead`."""


class Engine(Protocol):
    """Anything that generates. All methods are called on one event loop; none blocks it."""

    async def start(self, sink: StepSink) -> EngineFacts:
        """Loads, self-checks, starts stepping; deltas go to `sink`. Raises EngineError when it must not serve."""
        ...

    def submit(self, request: GenerateRequest) -> None:
        """Accepts a request: exactly one terminal delta will follow. Raises RefusedError, then none follows."""
        ...

    def abort(self, request_id: str) -> None:
        """Ends a request with finish_reason `abort` and frees its blocks within two steps. No-op when finished."""
        ...

    async def load_adapter(self, adapter: AdapterSpec) -> None: ...

    async def unload_adapter(self, adapter_id: str) -> None: ...

    def stats(self) -> EngineStats: ...

    def kv_events(self) -> list[KvEvent]:
        """Events since the last call, in order; empty for engines without `EngineFacts.events`."""
        ...

    async def drain(self) -> None:
        """Refuses new requests (`draining`) and returns when the running ones have ended."""
        ...

    async def close(self) -> None:
        """Stops at once; open requests end with `engine_dead`. Idempotent."""
        ...
