"""The start-up self-check: an engine that computes nonsense on this machine must not serve.

Some CPU back ends are wrong only for some shapes and types (one is known whose bfloat16 prefill of more than 32 tokens
gives fluent nonsense). So a fixed prompt goes through the real path, in two chunks and then token by token, and every
step's choice is compared with `reference_logits`: the same decoder written down once more in the most obvious way, in
float32, from the checkpoint's own tensors, without cache, chunks, fusing, packing or reordering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from replicas.contract import EngineError, GenerateRequest, SamplingParams, pack_tokens
from replicas.engine.core import Runner
from replicas.engine.families import DecoderSpec
from replicas.engine.rope import rope_table
from replicas.engine.sequence import Plan, PlanItem, Sequence

_PROMPT_TOKENS = 96
_FIRST_CHUNK = 56
_OUTPUT_TOKENS = 8

# How far (in nats) a logprob may be from the reference, and the chosen token from the likeliest.
_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.75, torch.float16: 0.25}


Inputs: TypeAlias = Callable[[str, Tensor], Tensor]
"""(module, its input) → the input as the module takes it."""


def _as_they_are(module: str, x: Tensor) -> Tensor:
    return x


class NamedTensors(Protocol):
    """A decoder's tensors by Hugging Face's names; quantised ones as what they mean."""

    def get(self, name: str) -> Tensor: ...

    def __contains__(self, name: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class CheckSubject:
    """What is checked: a runner, its cache's size and its longest context. Blocks from 0 on are overwritten.

    `rounding`: nats that come on top of the dtype's own, where activations or the KV cache are rounded to 8 bits.
    `has_kernels`: whether compiled kernels are part of the path.
    """

    runner: Runner
    num_blocks: int
    block_size: int
    max_len: int
    dtype: torch.dtype
    rounding: float = 0.0
    has_kernels: bool = False


def self_check(subject: CheckSubject, reference: Callable[[list[int], int], Tensor], vocab_size: int) -> str:
    """Compares a greedy continuation with the reference; returns what was found in words. Raises EngineError when they
    differ: then the engine must not serve.

    `reference(token_ids, num_last)` gives the logits of the last `num_last` positions, [num_last, vocab] float32.
    """
    room = min(subject.num_blocks * subject.block_size, subject.max_len) - _OUTPUT_TOKENS
    if room < 2:
        return f"skipped: a context of {subject.max_len} tokens has no room for it"
    seq = _sequence(_prompt(min(_PROMPT_TOKENS, room), vocab_size), subject)
    logprobs = _continue_greedily(subject.runner, seq)
    expected = torch.log_softmax(reference(list(seq.tokens[:-1]), _OUTPUT_TOKENS), dim=-1)
    chosen = expected[torch.arange(_OUTPUT_TOKENS), list(seq.tokens[seq.num_prompt :])]
    gap = (expected.max(dim=-1).values - chosen).max().item()
    error = (chosen - torch.tensor(logprobs)).abs().max().item()
    worst, tolerance = max(gap, error), _TOLERANCE[subject.dtype] + subject.rounding
    if not worst <= tolerance:  # also when it is NaN
        others = "engine.kernels: none, or another dtype," if subject.has_kernels else "another dtype"
        raise EngineError(
            f"the self-check failed: in {subject.dtype} a greedy continuation is {worst:.3g} nats from the float32 "
            f"reference, {tolerance} are allowed ({gap=:.3g} {error=:.3g}); {others} may be right on this machine"
        )
    return f"passed: {_OUTPUT_TOKENS} tokens after {seq.num_prompt}, at most {worst:.1e} nats from float32"


def reference_logits(
    checkpoint: NamedTensors, spec: DecoderSpec, device: torch.device, inputs: Inputs = _as_they_are
) -> Callable[[list[int], int], Tensor]:
    """The decoder as a textbook has it, for `self_check`. Holds one layer's tensors at a time.

    `inputs` rounds what goes into linear modules, where a scheme does so.
    """

    def get(name: str) -> Tensor:
        return checkpoint.get(name).to(device=device, dtype=torch.float32)

    @torch.inference_mode()
    def logits(token_ids: list[int], num_last: int) -> Tensor:
        embedding = checkpoint.get("model.embed_tokens.weight")
        x = embedding[token_ids].to(device=device, dtype=torch.float32)
        turns = rope_table(spec.rope, spec.head_dim, len(token_ids)).to(device)
        for i in range(spec.num_layers):
            x = _reference_layer(x, turns, spec, _Layer(i, f"model.layers.{i}.", get, inputs))
        x = F.rms_norm(x[-num_last:], x.shape[-1:], get("model.norm.weight"), spec.rms_norm_eps)
        tied = spec.tied_embeddings or "lm_head.weight" not in checkpoint
        return (x @ get("model.embed_tokens.weight" if tied else "lm_head.weight").T).cpu()

    return logits


@dataclass(frozen=True, slots=True)
class _Layer:
    index: int
    prefix: str
    get: Callable[[str], Tensor]
    inputs: Inputs

    def norm(self, x: Tensor, name: str, spec: DecoderSpec) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.get(f"{self.prefix}{name}.weight"), spec.rms_norm_eps)

    def linear(self, x: Tensor, name: str, has_bias: bool) -> Tensor:
        module = f"{self.prefix}{name}"
        bias = self.get(f"{module}.bias") if has_bias else None
        return F.linear(self.inputs(module, x), self.get(f"{module}.weight"), bias)


def _reference_layer(x: Tensor, turns: Tensor, spec: DecoderSpec, layer: _Layer) -> Tensor:
    h = layer.norm(x, "input_layernorm", spec)
    q, k, v = (
        layer.linear(h, f"self_attn.{name}_proj", spec.qkv_bias).view(x.shape[0], -1, spec.head_dim).transpose(0, 1)
        for name in "qkv"
    )  # [heads, tokens, head_dim]
    if spec.qk_norm:
        q, k = layer.norm(q, "self_attn.q_norm", spec), layer.norm(k, "self_attn.k_norm", spec)
    q, k = turned(q, turns), turned(k, turns)
    k, v = (kv.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=0) for kv in (k, v))
    scores = q @ k.transpose(1, 2) / spec.head_dim**0.5
    scores = scores.masked_fill(hidden_keys(x.shape[0], spec.windows[layer.index]).to(x.device), float("-inf"))
    attended = (torch.softmax(scores, dim=-1) @ v).transpose(0, 1).flatten(1)
    x = x + layer.linear(attended, "self_attn.o_proj", spec.output_bias)
    h = layer.norm(x, "post_attention_layernorm", spec)
    gate, up = (layer.linear(h, f"mlp.{name}_proj", spec.mlp_bias) for name in ("gate", "up"))
    return x + layer.linear(F.silu(gate) * up, "mlp.down_proj", spec.mlp_bias)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotates the pairs (i, i + head_dim // 2), as checkpoints have them."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * turns.real - second * turns.imag, second * turns.real + first * turns.imag], dim=-1)


def hidden_keys(num_tokens: int, window: int | None) -> Tensor:
    """Which keys a query must not see. [num_tokens, num_tokens]"""
    queries, keys = torch.arange(num_tokens)[:, None], torch.arange(num_tokens)
    hidden = keys > queries
    return hidden if window is None else hidden | (keys <= queries - window)


def _prompt(num_tokens: int, vocab_size: int) -> list[int]:
    """A fixed pattern, said twice: a trained model is sure how it goes on, so that near-ties cannot blur the check."""
    half = -(-num_tokens // 2)
    return [(i % half * 7919 + 1009) % vocab_size for i in range(num_tokens)]


def _sequence(prompt: list[int], subject: CheckSubject) -> Sequence:
    sampling = SamplingParams(max_tokens=_OUTPUT_TOKENS, seed=0, temperature=0.0, logprobs=0)
    request = GenerateRequest(request_id="self-check", prompt=pack_tokens(prompt), sampling=sampling)
    seq = Sequence.from_request(request, 0.0)
    seq.block_ids = list(range(-(-(len(prompt) + _OUTPUT_TOKENS) // subject.block_size)))
    return seq


def _continue_greedily(runner: Runner, seq: Sequence) -> list[float]:
    """Appends the continuation to `seq`; returns the engine's logprobs of it."""
    first = min(_FIRST_CHUNK, seq.num_prompt - 1)
    runner.execute(Plan((PlanItem(seq, 0, first, samples=False),)))
    start = first
    logprobs: list[float] = []
    for _ in range(_OUTPUT_TOKENS):
        ((sampled,),) = runner.execute(Plan((PlanItem(seq, start, seq.num_tokens - start, samples=True),))).sampled
        assert sampled.logprob is not None
        logprobs.append(sampled.logprob.logprob)
        start = seq.num_tokens
        seq.tokens.append(sampled.token_id)
    return logprobs
