"""What a LoRA checkpoint in PEFT's format says of itself: its `adapter_config.json`, and the header of its weights.

adapter_config.json         rank, alpha, which linear layers, and switches of which we know some
adapter_model.safetensors   base_model.model.{module}.lora_A.weight [rank, in], .lora_B.weight [out, rank]

Nothing here needs torch: what cannot be served is refused before anybody opens the weights. The format and the meaning
of every key are PEFT's (`peft.LoraConfig`, 0.21).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import regex
import xxhash

Json: TypeAlias = Mapping[str, Any]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_RANK = 512
MAX_HEADER_BYTES = 4 * 1024 * 1024
"""A decoder of a hundred layers needs a quarter of one; reading it holds everybody up."""

_MAX_WORDS = 600
MAX_CONFIG_BYTES = 1024 * 1024

_ALL_LINEAR = "all-linear"
_ENDS = {"lm_head": "the output layer", "model.embed_tokens": "the token embeddings"}

_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
"""A pattern whose only wildcards are dots."""

_PATTERN_S = 0.2
"""A pattern that a checkpoint brings may not take longer than this over one name."""

_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules beside the low-rank ones (modules_to_save)",
    "lora_bias": "a bias in the low-rank product (lora_bias)",
    "trainable_token_indices": "changed token embeddings (trainable_token_indices)",
    "target_parameters": "adapted parameters instead of modules (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
"""Switches that change what the adapter computes, in words."""

_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base model's weights as they are; PiSSA, OLoRA, CorDA, LoftQ and others do not, and
their checkpoints are only right on top of what they changed."""


class LoraError(ValueError):
    """A checkpoint that cannot be read, or cannot be served here; the message says why, whatever a stranger wrote."""

    def __init__(self, message: str) -> None:
        super().__init__(message[:_MAX_WORDS].encode(errors="replace").decode())


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What an `adapter_config.json` says. Modules have their names in the base model: `model.layers.0.mlp.up_proj`.

    `targets`: ends of module names, or one pattern for whole names; None is every linear layer but the last
    (`all-linear`). `base_model`: what the adapter was trained on, by whatever name that had there.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    base_model: str = ""
    _compiled: dict[str, regex.Pattern[str]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def max_rank(self) -> int:
        """The largest rank that any module may have."""
        return max(self.rank, *self.rank_pattern.values()) if self.rank_pattern else self.rank

    def adapts(self, module: str) -> bool:
        """Whether a linear layer of this name has low-rank matrices. Raises LoraError for a pattern that is no good."""
        if self.excluded and _named(self.excluded, module):
            return False
        if self.targets is None:
            return True
        return _named(self.targets, module) and self._in_layers(module)

    def rank_of(self, module: str) -> int:
        return int(self._by_pattern(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """What B A x is multiplied with: alpha / rank, or alpha / √rank when rank-stabilised (Kalajdzievski 2023)."""
        rank, alpha = self.rank_of(module), self._by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def _by_pattern(self, patterns: Mapping[str, float], module: str, otherwise: float) -> float:
        """The value of the first pattern that a module's name ends with."""
        return next((value for key, value in patterns.items() if self._ends(module, key)), otherwise)

    def _ends(self, module: str, key: str) -> bool:
        """Whether a name's last parts match a pattern. Checkpoints may bring one for each of hundreds of modules: each
        is compiled once, and none is asked about a name that it cannot match."""
        if _PLAIN.fullmatch(key) and not module.endswith(key.rpartition(".")[2]):
            return False
        if key not in self._compiled:
            self._compiled[key] = _compiled(rf"(.*\.)?({key})$")
        return _found(self._compiled[key], module) is not None

    def _in_layers(self, module: str) -> bool:
        """`layers_to_transform` counts only where targets are a list, as in PEFT."""
        if self.layers is None or isinstance(self.targets, str):
            return True
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := _match(pattern, module))), None)
        return found is not None and int(found[1]) in self.layers


@dataclass(frozen=True, slots=True)
class TensorHeader:
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoraFiles:
    """A checkpoint folder, its weights unread."""

    folder: Path
    config: LoraConfig
    tensors: Mapping[str, TensorHeader]
    num_bytes: int

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    def digest(self) -> str:
        """Names the weights and what the configuration makes of them; reads the whole file. Raises LoraError."""
        hashed = xxhash.xxh3_128(repr(self.config).encode())
        try:
            with self.weights.open("rb") as file:
                while chunk := file.read(1 << 20):
                    hashed.update(chunk)
        except OSError as error:
            raise LoraError(f"{self.weights} cannot be read: {error}") from error
        return hashed.hexdigest()


def lora_folder(path: str) -> Path:
    """The folder that is meant, `~` expanded. Raises LoraError."""
    try:
        return Path(path).expanduser()
    except (OSError, RuntimeError, ValueError) as error:
        raise LoraError(f"{path!r} names no folder: {error}") from error


def read_lora(folder: Path) -> LoraFiles:
    """Reads a folder as `PeftModel.save_pretrained` writes it, but for the weights. Raises LoraError."""
    try:
        config = parse_config(_read_json(folder / CONFIG), folder / CONFIG)
        path = folder / WEIGHTS
        if not path.is_file():
            others = sorted(p.name for p in folder.glob("adapter_model.*"))
            instead = f"; {', '.join(others)} cannot be served: save it as safetensors" if others else ""
            raise LoraError(f"{path} is missing{instead}")
        return LoraFiles(folder, config, read_header(path), path.stat().st_size)
    except LoraError:
        raise
    except (OSError, ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as error:
        raise LoraError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error


def parse_config(config: Json, path: Path) -> LoraConfig:
    """An `adapter_config.json`. Raises LoraError naming what is missing, out of bounds or unknown to us."""
    try:
        _check_kind(config)
        parsed = LoraConfig(
            rank=_rank(config["r"], "r"),
            alpha=_number(config["lora_alpha"], "lora_alpha"),
            targets=_targets(config.get("target_modules")),
            excluded=_names(config.get("exclude_modules"), "exclude_modules"),
            layers=_layers(config.get("layers_to_transform")),
            layers_pattern=_listed(config.get("layers_pattern"), "layers_pattern"),
            rank_pattern={k: _rank(v, f"rank_pattern[{k}]") for k, v in _mapping(config, "rank_pattern").items()},
            alpha_pattern={k: _number(v, f"alpha_pattern[{k}]") for k, v in _mapping(config, "alpha_pattern").items()},
            rank_stabilised=bool(config.get("use_rslora")),
            base_model=str(config.get("base_model_name_or_path") or ""),
        )
        for pattern in (*parsed.rank_pattern, *parsed.alpha_pattern):
            _match(pattern, "model")
        for module, words in _ENDS.items():
            if parsed.targets is not None and parsed.adapts(module):
                raise LoraError(f"it adapts {words} ({module}): only linear layers inside the decoder can be served")
    except KeyError as error:
        raise LoraError(f"{path} lacks {error.args[0]!r}") from error
    except LoraError as error:
        raise LoraError(f"{path}: {error}") from error
    return parsed


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors that a safetensors file says it has, checked against its size. Raises LoraError."""
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, num_bytes - 8):
                raise LoraError(f"{path} is no safetensors file: a header of {length} bytes in a file of {num_bytes}")
            header = json.loads(file.read(length))
        found = {
            name: TensorHeader(about["dtype"], tuple(int(size) for size in about["shape"]))
            for name, about in header.items()
            if name != "__metadata__"
        }
        end = max((about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"), default=0)
        if not isinstance(end, int):
            raise LoraError(f"{path} has an end that is no number: {end!r}")
    except LoraError:
        raise
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoraError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if 8 + length + end != num_bytes:
        raise LoraError(f"{path} is cut off or damaged: {num_bytes} bytes, its header tells of {8 + length + end}")
    return found


def _check_kind(config: Json) -> None:
    """Refuses what would be served wrong."""
    kind = config.get("peft_type", "LORA")
    if str(kind).upper() != "LORA":
        raise LoraError(f"peft_type is {kind!r}: only LORA can be served")
    for key, words in _REFUSED.items():
        if config.get(key):
            raise LoraError(f"{words} cannot be served")
    if config.get("bias", "none") != "none":
        raise LoraError(f"bias is {config['bias']!r}: only adapters with bias none can be served")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise LoraError(
            f"init_lora_weights is {init!r}, which changed the base model's own weights: "
            "convert it to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _targets(value: Any) -> tuple[str, ...] | str | None:
    if isinstance(value, str):
        return None if value.lower() == _ALL_LINEAR else value
    names = _listed(value, "target_modules")
    if not names:
        raise LoraError("target_modules is empty")
    return None if _ALL_LINEAR in names else names


def _names(value: Any, key: str) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else _listed(value, key)


def _listed(value: Any, key: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LoraError(f"{key} must be a list of names, got {value!r}")
    return tuple(names)


def _layers(value: Any) -> tuple[int, ...] | None:
    layers = [value] if isinstance(value, int) else value or []
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise LoraError(f"layers_to_transform must be a list of numbers, got {value!r}")
    return tuple(layers) or None


def _mapping(config: Json, key: str) -> Json:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise LoraError(f"{key} must be an object, got {value!r}")
    return value


def _rank(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise LoraError(f"{key} must be 1 to {MAX_RANK}, got {value!r}")
    return value


def _number(value: Any, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise LoraError(f"{key} must be a number, got {value!r}")
    return float(value)


def _named(names: tuple[str, ...] | str, module: str) -> bool:
    """A pattern names whole modules, a list their last parts."""
    if isinstance(names, str):
        return _match(rf"(?:{names})$", module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _match(pattern: str, name: str) -> regex.Match[str] | None:
    """`re.match` for patterns of strangers: bounded in time."""
    return _found(_compiled(pattern), name)


def _compiled(pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise LoraError(f"{pattern!r} is no pattern: {error}") from error


def _found(pattern: regex.Pattern[str], name: str) -> regex.Match[str] | None:
    try:
        return pattern.match(name, timeout=_PATTERN_S)
    except TimeoutError as error:
        raise LoraError(f"the pattern {pattern.pattern!r} takes too long over {name!r}") from error


def _read_json(path: Path) -> Json:
    try:
        if path.exists() and not path.is_file():
            raise LoraError(f"{path} is no file")
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise LoraError(f"{path} has more than {MAX_CONFIG_BYTES} bytes")
        value = json.loads(content)
    except LoraError:
        raise
    except FileNotFoundError as error:
        raise LoraError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise LoraError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise LoraError(f"{path} is not a JSON object")
    return value


_WORDS = re.compile(r"[^a-z0-9]+")


def same_model(name: str, known: str) -> bool:
    """Whether two names of models agree, but for the folder or organisation before them, case and punctuation."""
    return _plain_name(name) == _plain_name(known)


_QUANTISED = re.compile(r"awq|gptq|marlin|bnb|gguf|fp8|nf4|quantized|int[48]|[48]bit|w[48]a(8|16)|q[48](_\d)?")
"""Words at the end of a name that say how the same model's weights are kept: adapters fit all of them."""


def _plain_name(name: str) -> str:
    last = name.rstrip("/").rpartition("/")[2].rpartition("--")[2].lower()
    words = [word for word in _WORDS.split(last) if word]
    while len(words) > 1 and _QUANTISED.fullmatch(words[-1]):
        words.pop()
    return "".join(words)
