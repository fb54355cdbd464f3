"""Speculation in the native engine: loads what a method needs, and puts it beside the model it guesses for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from configs.catalogue import model_dir
from configs.runtime import home_dir
from configs.schema import EngineConfig, SpeculativeConfig
from replicas.contract import EngineError
from replicas.engine.attention import KvCache, KvGeometry, block_bytes
from replicas.engine.block_pool import BlockPool
from replicas.engine.families import DecoderSpec, read_spec
from replicas.engine.model import Decoder
from replicas.engine.noise import hash_tokens
from replicas.engine.quantization.linears import QuantisedLinears
from replicas.engine.quantization.opening import open_source
from replicas.engine.rope import rope_table
from replicas.engine.runner import TorchRunner
from replicas.engine.speculative import mlp
from replicas.engine.speculative.draft_model import DraftLimits, DraftModelDrafter
from replicas.engine.speculative.drafter import Drafter
from replicas.engine.speculative.setup import speculator, without_model
from replicas.engine.speculative.speculator import Speculator
from replicas.engine.weights import DecoderWeights, Embedding, WeightLoader


@dataclass(frozen=True, slots=True)
class Target:
    """The model that is guessed for. `num_blocks` and `max_len` are its cache's."""

    runner: TorchRunner
    embedding: Embedding
    num_blocks: int
    max_len: int


class Method(Protocol):
    """A method of speculation, its files read."""

    def block_bytes(self, block_size: int) -> int:
        """What it adds to each KV block of the model."""
        ...

    def drafter(self, config: EngineConfig, target: Target) -> Drafter:
        """The drafter, ready to guess for `target`."""
        ...


def load_method(config: EngineConfig, spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> Method | None:
    """What the profile asks for, None when it asks for nothing. Raises EngineError when files are missing, broken, or
    another model's."""
    asked = config.speculative
    if asked is None:
        return None
    if asked.method == "draft_model":
        return _load_draft_model(_folder(asked), spec, dtype, device)
    if asked.method == "mlp_speculator":
        weights = mlp.load(_folder(asked), spec.hidden_size, spec.vocab_size).to(device, dtype)
        return MlpMethod(weights, hash_tokens(spec.vocab_size, device))
    return TokenMethod(asked)


def make_speculator(method: Method | None, config: EngineConfig, target: Target) -> Speculator | None:
    """The speculator of an engine; None without a method."""
    if method is None or config.speculative is None:
        return None
    return speculator(config.speculative, method.drafter(config, target))


@dataclass(frozen=True, slots=True)
class TokenMethod:
    """Looks at tokens alone."""

    config: SpeculativeConfig

    def block_bytes(self, block_size: int) -> int:
        return 0

    def drafter(self, config: EngineConfig, target: Target) -> Drafter:
        return without_model(self.config)


@dataclass(frozen=True, slots=True)
class MlpMethod:
    """A learned head on the model's features."""

    weights: mlp.MlpWeights
    hashes: Tensor

    def block_bytes(self, block_size: int) -> int:
        return 0

    def drafter(self, config: EngineConfig, target: Target) -> Drafter:
        drafter = mlp.MlpDrafter(self.weights, target.embedding, self.hashes)
        target.runner.tap = drafter
        return drafter


@dataclass(frozen=True, slots=True)
class DraftModelMethod:
    """A smaller model. It has as many KV blocks as the large one, each as much smaller as it is itself."""

    spec: DecoderSpec
    weights: DecoderWeights
    dtype: torch.dtype
    device: torch.device

    def block_bytes(self, block_size: int) -> int:
        return block_bytes(self.spec, block_size, self.dtype)

    def drafter(self, config: EngineConfig, target: Target) -> Drafter:
        max_len = min(target.max_len, self.spec.max_len)
        turns = rope_table(self.spec.rope, self.spec.head_dim, max_len).to(self.device)
        geometry = KvGeometry.of(self.spec, config.block_size, self.dtype, self.device)
        cache = KvCache(geometry, self.spec.num_layers, target.num_blocks)
        runner = TorchRunner(Decoder(self.spec, self.weights, turns), cache, geometry)
        limits = DraftLimits(max_len, config.max_num_batched_tokens)
        return DraftModelDrafter(runner, BlockPool(target.num_blocks, config.block_size), limits)


def _load_draft_model(folder: Path, spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> DraftModelMethod:
    small = read_spec(folder)
    if small.vocab_size != spec.vocab_size:
        raise EngineError(f"{folder} has a vocabulary of {small.vocab_size} tokens, the model one of {spec.vocab_size}")
    opened = open_source(folder, small, EngineConfig(), has_kernels=False)  # as its files have it
    weights = WeightLoader(opened.source, small, dtype, device, QuantisedLinears(None, device)).load()
    return DraftModelMethod(small, weights, dtype, device)


def _folder(config: SpeculativeConfig) -> Path:
    if config.model is None:
        raise EngineError(f"speculative decoding by {config.method} needs a model")
    return model_dir(config.model, home_dir(os.environ))
