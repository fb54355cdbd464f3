"""The settings that are swept: where they stand in a profile, which values make sense, which were asked for.

Each engine has its own: the chunk of a prompt that a step takes beside running answers is bounded in tokens by vLLM
(`long_prefill_token_threshold`), in seconds by the in-house engine (`max_prefill_stall_s`); vLLM on GPUs takes a share
of the card (`gpu_memory_utilization`), everything else a number of GiB (`kv_cache_gib`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from configs import keys
from configs.document import read_value
from configs.errors import ConfigError, KeyPath, Origin, show_key
from configs.schema import EngineConfig, GroupConfig
from ops.gpu_memory import needs_gpu
from ops.memory import GIB
from ops.tune.findings import Value
from ops.tune.workload import Slo, Workload


@dataclass(frozen=True, slots=True)
class Knob:
    """A setting. `key`: within the engine; `off`: its value where the profile says nothing of it."""

    name: str
    key: KeyPath
    off: Value = None

    def of(self, engine: EngineConfig) -> Value:
        found: Any = msgspec.to_builtins(engine)
        for part in self.key:
            found = found.get(part, self.off)
        value: Value = found
        return value

    @property
    def kind(self) -> Any:
        """The type and bounds of its values."""
        if self.key[:2] == ("vllm", "arguments"):  # of these the schema says nothing
            return Annotated[int, Meta(ge=0)]
        return keys.type_at(("groups", 0, "engine", *self.key))


MAX_NUM_SEQS = Knob("max_num_seqs", ("max_num_seqs",))
MAX_NUM_BATCHED_TOKENS = Knob("max_num_batched_tokens", ("max_num_batched_tokens",))
CHUNK_TOKENS = Knob("long_prefill_token_threshold", ("vllm", "arguments", "long_prefill_token_threshold"), 0)
CHUNK_SECONDS = Knob("max_prefill_stall_s", ("max_prefill_stall_s",))
KV_CACHE_GIB = Knob("kv_cache_gib", ("kv_cache_gib",))
GPU_SHARE = Knob("gpu_memory_utilization", ("vllm", "gpu_memory_utilization"))
KNOBS = (MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, CHUNK_TOKENS, CHUNK_SECONDS, KV_CACHE_GIB, GPU_SHARE)

_OFF_WORDS = ("none", "off", "null")


def knobs_of(group: GroupConfig) -> tuple[Knob, ...]:
    """Those that a group's engine looks at, in the order they are swept."""
    kind = group.engine.kind
    if kind == "vllm":
        return (MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, CHUNK_TOKENS, GPU_SHARE if needs_gpu(group) else KV_CACHE_GIB)
    memory = (KV_CACHE_GIB,) if kind == "native" else ()
    return (MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, CHUNK_SECONDS, *memory)


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of KV cache a token takes, and what is free for all replicas of the group; none where nothing is held.
    `longest_tokens`: the request that must fit, else the engine does not start."""

    bytes_per_token: int = 0
    free_bytes: int = 0
    longest_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """What decides which values make sense: a group as the profile has it, and what it is to do."""

    group: GroupConfig
    workload: Workload
    slo: Slo
    room: Room = Room()


def derived(knob: Knob, asked: Asked) -> tuple[Value, ...]:
    """Values around the profile's own, which is the first: only possible ones, and none that could change nothing."""
    engine, workload = asked.group.engine, asked.workload
    now = knob.of(engine)
    others: Sequence[Value] = ()
    if knob is MAX_NUM_SEQS:
        at_once = -(-workload.num_requests // asked.group.replicas)
        others = [n for n in (engine.max_num_seqs // 2, engine.max_num_seqs * 2) if 1 <= n < 2 * at_once]
        if engine.max_num_seqs >= 2 * at_once:  # half of it holds everything too
            others = []
    elif knob is MAX_NUM_BATCHED_TOKENS:
        at_least = max(engine.max_num_seqs, 16)
        at_most = 2 * workload.num_requests * workload.input_tokens  # all prompts fit into half of it
        around = (engine.max_num_batched_tokens * 2**power // 2 for power in (0, 2, 3))
        others = [n for n in around if at_least <= n <= at_most]
    elif knob is CHUNK_TOKENS:
        own = workload.input_tokens - workload.shared_tokens
        others = [0, *(own // part // 32 * 32 for part in (2, 4) if own // part >= 32)]
    elif knob is CHUNK_SECONDS:
        others = [None, *(round(asked.slo.tpot_s * part, 4) for part in (1.0, 0.5))]
    elif knob is GPU_SHARE:
        share = engine.vllm.gpu_memory_utilization
        others = [round(share - 0.1, 2), 0.95] if share > 0.2 else [0.95]
    elif knob is KV_CACHE_GIB:
        others = _cache_sizes(asked)
    return tuple(dict.fromkeys((now, *others)))


def _cache_sizes(asked: Asked) -> list[Value]:
    """Half and double, as far as they hold the longest request, fit into free memory, and are not beyond what all
    sequences together can fill."""
    engine, workload, room = asked.group.engine, asked.workload, asked.room
    a_request = (workload.input_tokens + workload.output_tokens) * room.bytes_per_token / GIB
    at_least = max(a_request, room.longest_tokens * room.bytes_per_token / GIB)
    filled = a_request * engine.max_num_seqs * 2  # twice as many sequences are tried too
    fits = room.free_bytes / GIB / asked.group.replicas
    now = engine.kv_cache_gib
    found: list[Value] = [now / 2] if at_least <= now / 2 < filled else []
    return [*found, now * 2] if now < filled and now * 2 <= fits else found


def parse_sweep(text: str) -> tuple[Knob, tuple[Value, ...]]:
    """What `--sweep KNOB=VALUE,VALUE` says. Raises ConfigError naming the knob or its key."""
    name, equals, listed = text.partition("=")
    name = name.strip().rpartition(".")[2]
    origin = Origin(f"--sweep {text}")
    if not equals or not listed.strip():
        raise ConfigError("expected KNOB=VALUE,VALUE like max_num_seqs=8,16,32", origin=origin)
    knob = next((knob for knob in KNOBS if knob.name == name), None)
    if knob is None:
        close = difflib.get_close_matches(name, [knob.name for knob in KNOBS], n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(knob.name for knob in KNOBS)}"
        raise ConfigError(f"unknown knob {name!r}; {hint}", origin=origin)
    values = [_read(knob, word.strip(), origin) for word in listed.split(",")]
    return knob, tuple(dict.fromkeys(values))


def _read(knob: Knob, word: str, origin: Origin) -> Value:
    given = knob.off if word.lower() in _OFF_WORDS else read_value(word)
    try:
        value: Value = msgspec.convert(given, knob.kind)
    except msgspec.ValidationError as error:
        reason = str(error).replace("`", "").partition(", got ")[0]
        raise ConfigError(f"{reason[0].lower()}{reason[1:]}, got {word}", key=knob.key, origin=origin) from None
    return value


def merged(sweeps: Sequence[tuple[Knob, tuple[Value, ...]]]) -> dict[str, tuple[Value, ...]]:
    """Asked-for values by the knob's name; a knob that was named twice gets both lists."""
    found: dict[str, tuple[Value, ...]] = {}
    for knob, values in sweeps:
        found[knob.name] = tuple(dict.fromkeys((*found.get(knob.name, ()), *values)))
    return found


def space_of(asked: Asked, wanted: Mapping[str, tuple[Value, ...]]) -> dict[str, tuple[Value, ...]]:
    """Every knob of the group's engine with its values, the profile's own first. As soon as values were asked for,
    knobs that were not named keep theirs."""
    if not wanted:
        return {knob.name: derived(knob, asked) for knob in knobs_of(asked.group)}
    engine = asked.group.engine
    return {
        knob.name: tuple(dict.fromkeys((knob.of(engine), *wanted.get(knob.name, ())))) for knob in knobs_of(asked.group)
    }


def where(knob: Knob, group_index: int) -> str:
    """The knob's place in the profile, as a person writes it."""
    return show_key(("groups", group_index, "engine", *knob.key))
