"""One description of a decoder, read from a Hugging Face config.json: families differ in numbers and switches only.

Llama 2/3, SmolLM2, Mistral, Qwen2/2.5 and Qwen3 are the same pre-norm decoder with rotary positions, grouped-query
attention and a gated SiLU MLP. A family is a function from config.json to those of its switches that the file leaves
unsaid; adding one is a function and a line in `_FAMILIES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from replicas.contract import EngineError

RopeKind: TypeAlias = Literal["default", "linear", "dynamic", "yarn", "llama3"]
Json: TypeAlias = Mapping[str, Any]

_ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "yarn", "llama3")
_DEFAULT_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions. `original_max_len` is the context the model was trained with before scaling."""

    theta: float
    kind: RopeKind
    original_max_len: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Everything that shapes a decoder.

    `windows[i]` is layer i's sliding window in tokens, the querying one included; None sees all. `dtype` is what the
    checkpoint says of itself; `eos_token_ids` come from generation_config.json too.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_len: int
    rope: RopeSpec
    windows: tuple[int | None, ...]
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    eos_token_ids: tuple[int, ...] = ()

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token adds to one layer's KV cache."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class _Switches:
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


def read_spec(model_dir: Path) -> DecoderSpec:
    """Reads `config.json` and `generation_config.json`. Raises EngineError naming what is missing or unknown."""
    config = read_json(model_dir / "config.json")
    generation = model_dir / "generation_config.json"
    eos = _token_ids(config.get("eos_token_id"))
    if generation.is_file():
        eos += _token_ids(read_json(generation).get("eos_token_id"))
    return spec_from_config(config, tuple(dict.fromkeys(eos)))


def spec_from_config(config: Json, eos_token_ids: tuple[int, ...] = ()) -> DecoderSpec:
    """The description of one config.json. Raises EngineError for an architecture or a feature we do not have."""
    architectures = config.get("architectures") or []
    name = next((a for a in architectures if a in _FAMILIES), None)
    if name is None:
        raise EngineError(f"unknown architecture {architectures or None}: this engine has {sorted(_FAMILIES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise EngineError(f"unknown activation {config['hidden_act']!r}: this engine has silu")
    try:
        return _build(name, config, eos_token_ids)
    except KeyError as error:
        raise EngineError(f"config.json of {name} lacks {error.args[0]!r}") from error


def _build(name: str, config: Json, eos_token_ids: tuple[int, ...]) -> DecoderSpec:
    num_heads = int(config["num_attention_heads"])
    rope = _rope(config)
    switches = _FAMILIES[name](config)
    return DecoderSpec(
        family=name,
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // num_heads),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_len=_max_len(config, rope),
        rope=rope,
        windows=switches.windows,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=switches.qkv_bias,
        output_bias=switches.output_bias,
        mlp_bias=switches.mlp_bias,
        qk_norm=switches.qk_norm,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        eos_token_ids=eos_token_ids,
    )


def _llama(config: Json) -> _Switches:
    bias = bool(config.get("attention_bias", False))
    return _Switches(_no_windows(config), qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def _mistral(config: Json) -> _Switches:
    return _Switches((_window(config),) * int(config["num_hidden_layers"]))


def _qwen2(config: Json) -> _Switches:
    return _Switches(_qwen_windows(config), qkv_bias=True)


def _qwen3(config: Json) -> _Switches:
    bias = bool(config.get("attention_bias", False))
    return _Switches(_qwen_windows(config), qkv_bias=bias, output_bias=bias, qk_norm=True)


_FAMILIES: dict[str, Callable[[Json], _Switches]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}


def _no_windows(config: Json) -> tuple[None, ...]:
    return (None,) * int(config["num_hidden_layers"])


def _window(config: Json) -> int | None:
    window = config.get("sliding_window")
    return int(window) if window else None


def _qwen_windows(config: Json) -> tuple[int | None, ...]:
    """Qwen slides in the layers that `layer_types` names, in older files in those from `max_window_layers` on."""
    window = _window(config) if config.get("use_sliding_window") else None
    layers = range(int(config["num_hidden_layers"]))
    types = config.get("layer_types")
    if types:
        return tuple(window if types[i] == "sliding_attention" else None for i in layers)
    first = int(config.get("max_window_layers", 28))
    return tuple(window if i >= first else None for i in layers)


def _rope(config: Json) -> RopeSpec:
    """Reads both spellings: `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling` (before)."""
    scaling: Json = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise EngineError(f"rotary positions that differ by layer are unknown: {sorted(scaling)}")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in _ROPE_KINDS:
        raise EngineError(f"unknown rope scaling {kind!r}: this engine has {list(_ROPE_KINDS)}")
    if float(scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise EngineError("rotary positions on a part of the head are unknown")
    max_len = int(config["max_position_embeddings"])
    # For linear and dynamic scaling the trained length is max_position_embeddings itself.
    scales_own = kind in ("yarn", "llama3")
    original = int(scaling.get("original_max_position_embeddings") or max_len) if scales_own else max_len
    theta = scaling.get("rope_theta") or config.get("rope_theta") or _DEFAULT_THETA
    factor = scaling.get("factor") or (max_len / original)
    return RopeSpec(
        theta=float(theta),
        kind=kind,
        original_max_len=original,
        factor=float(factor),
        low_freq_factor=float(scaling.get("low_freq_factor") or 1.0),
        high_freq_factor=float(scaling.get("high_freq_factor") or 4.0),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        attention_factor=scaling.get("attention_factor"),
        mscale=scaling.get("mscale"),
        mscale_all_dim=scaling.get("mscale_all_dim"),
        truncate=bool(scaling.get("truncate", True)),
    )


def _max_len(config: Json, rope: RopeSpec) -> int:
    """The longest context. Scaling stretches the trained one; llama3 files give the stretched length themselves."""
    max_len = int(config["max_position_embeddings"])
    if rope.kind in ("default", "llama3"):
        return max_len
    return max(max_len, int(rope.original_max_len * rope.factor))


def _token_ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def read_json(path: Path) -> Json:
    """A JSON object. Raises EngineError naming the file."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise EngineError(f"{path} is missing") from error
    except json.JSONDecodeError as error:
        raise EngineError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise EngineError(f"{path} is not a JSON object")
    return content
