"""One engine as it is tuned: a profile's group, or the same group on another engine; its knobs turned; written down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from configs.errors import ConfigError, Origin
from configs.load import Override, Profile, load_profile
from configs.schema import Config, EngineConfig, GroupConfig, TenantConfig
from ops.tune.findings import Value, Values, key_of
from ops.tune.knobs import KNOBS, Knob

_SHARED = (
    "dtype", "device", "threads", "block_size", "kv_cache_gib", "max_model_len", "max_num_seqs",
    "max_num_batched_tokens", "max_waiting", "max_adapters", "max_lora_rank", "lora_dtype", "lora_base_models",
    "prefix_caching", "order", "quantization", "kv_cache_dtype", "structured", "self_check", "speculative",
)  # fmt: skip
"""What means the same to the in-house engine and to vLLM."""

_VLLM_CPU_DTYPE = "float32"

BY_NAME = {knob.name: knob for knob in KNOBS}


@dataclass(frozen=True, slots=True)
class Subject:
    """`overrides`: what the command line sets on top of the file; `env`: the environment's settings."""

    profile: str
    group_index: int
    overrides: tuple[Override, ...] = ()
    env: Mapping[str, str] | None = None

    def load(self, values: Values | None = None) -> Profile:
        """The profile with these values. Raises ConfigError when they cannot be."""
        return load_profile(self.profile, self.env or {}, [*self.overrides, *self._changes(values or {})])

    @property
    def group(self) -> GroupConfig:
        return self.load().config.groups[self.group_index]

    def is_possible(self, values: Values) -> bool:
        try:
            self.load(values)
        except ConfigError:
            return False
        return True

    def alone(self, values: Values | None = None) -> Config:
        """The profile's group on its own, with its model and one tenant who may do everything: what a trial runs."""
        config = self.load(values).config
        group = config.groups[self.group_index]
        return msgspec.structs.replace(
            config,
            cluster="tune",
            models=tuple(model for model in config.models if model.id == group.model),
            groups=(group,),
            tenants=(TenantConfig(id="tune", anonymous=True),),
            adapters=(),
            adapter_sources=(),
            telemetry=msgspec.structs.replace(config.telemetry, usage_log=None),
        )

    def fixed(self) -> dict[str, Any]:
        """Everything about a trial but the knobs."""
        config: dict[str, Any] = msgspec.to_builtins(self.alone())
        engine = config["groups"][0]["engine"]
        for knob in KNOBS:
            section = engine
            for part in knob.key[:-1]:
                section = section[part]
            section.pop(knob.key[-1], None)
        for section_name in ("http", "ray", "redis", "telemetry"):  # a trial has its own
            config.pop(section_name)
        return config

    def on(self, kind: str) -> Subject:
        """The same group on another engine, with all settings that mean the same there.

        Raises ConfigError when the profile's checks refuse that.
        """
        engine = _moved(self.group.engine, kind)
        plain = msgspec.to_builtins(EngineConfig())
        tree = {name: value for name, value in msgspec.to_builtins(engine).items() if value != plain[name]}
        text = json.dumps({"kind": kind, **tree})
        whole = Override(Origin(f"the comparison with engine {kind}"), ("groups", self.group_index, "engine"), text)
        other = replace(self, overrides=(*self.overrides, whole))
        other.load()
        return other

    def tree(self, values: Values) -> Any:
        """The whole profile as a tree to be written: the file, the command line's settings and these values. What the
        environment sets stays there, secrets with it."""
        return replace(self, env=None).load(self._differing(values)).document.tree

    def named(self, values: Values) -> str:
        """What differs from the profile, as a person reads it."""
        return key_of(self._differing(values)).replace(",", ", ") or "as in the profile"

    def _differing(self, values: Values) -> dict[str, Value]:
        engine = self.group.engine
        return {name: value for name, value in values.items() if BY_NAME[name].of(engine) != value}

    def _changes(self, values: Values) -> list[Override]:
        if not values:
            return []
        return [self._change(BY_NAME[name], value) for name, value in self._differing(values).items()]

    def _change(self, knob: Knob, value: Value) -> Override:
        key = ("groups", self.group_index, "engine", *knob.key)
        return Override(Origin(f"{knob.name}={value}"), key, json.dumps(value))


def _moved(engine: EngineConfig, kind: str) -> EngineConfig:
    kept = {name: getattr(engine, name) for name in _SHARED}
    if kind == "vllm":
        kept["block_size"] = max(32, engine.block_size)
        if engine.device == "cpu" and engine.dtype == "auto":
            kept["dtype"] = _VLLM_CPU_DTYPE
    return msgspec.structs.replace(EngineConfig(kind=kind), **kept)  # type: ignore[arg-type]
