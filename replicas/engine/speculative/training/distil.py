"""Makes a draft model out of the model it is to guess for: some of its layers, taught to end up where all of them do.

Embeddings and head stay the model's, so the vocabulary does too; only the layers kept and the last norm are trained.
(Layer pruning with distillation as in Sheared Llama, Xia et al. 2023, and DistillSpec, Zhou et al. 2023.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from replicas.contract import EngineError
from replicas.engine.speculative.training.texts import Progress, Text, has_fast_bfloat16, likeliest_tokens


@dataclass(frozen=True, slots=True)
class DistilPlan:
    """`num_layers` are kept; the loss looks at the `num_scored` likeliest tokens."""

    seconds: float
    num_layers: int = 4
    num_scored: int = 8192
    learning_rate: float = 5e-4
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class DistilResult:
    """`agreement`: how often, in texts that were kept apart, the small model's likeliest token was the model's."""

    agreement: float
    agreement_before: float
    num_batches: int


def kept_layers(num_layers: int, num_kept: int) -> tuple[int, ...]:
    """Which layers stay: the first, which read, and the last, which speaks."""
    if not 1 <= num_kept < num_layers:
        raise EngineError(f"a draft model keeps 1 to {num_layers - 1} of {num_layers} layers, not {num_kept}")
    return (*range(num_kept - 1), num_layers - 1)


def distil(
    model_dir: Path, out: Path, texts: Sequence[Text], plan: DistilPlan, *, progress: Progress,
    clock: Callable[[], float] = time.monotonic,
) -> DistilResult:  # fmt: skip
    """Writes the draft model to `out`. Raises EngineError when the model has too few layers."""
    from transformers import AutoModelForCausalLM  # slow to load

    torch.manual_seed(plan.seed)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    _prune(model, kept_layers(model.config.num_hidden_layers, plan.num_layers))
    head: Tensor = model.lm_head.weight.detach()
    teacher = head[likeliest_tokens(texts, plan.num_scored, head.shape[0])]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = [p for part in (model.model.layers, model.model.norm) for p in part.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    num_kept = max(1, len(texts) // 20)
    before = _agreement(model, texts[:num_kept], teacher)
    num_batches = _train(model, trained, texts[num_kept:], teacher, _Run(plan, progress, clock))
    after = _agreement(model, texts[:num_kept], teacher)
    model.save_pretrained(out)
    return DistilResult(after, before, num_batches)


@dataclass(frozen=True, slots=True)
class _Run:
    plan: DistilPlan
    progress: Progress
    clock: Callable[[], float]


def _prune(model: Any, kept: Sequence[int]) -> None:
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[i] for i in kept])
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    config = model.config
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]


def _train(model: Any, trained: list[Tensor], texts: Sequence[Text], teacher: Tensor, run: _Run) -> int:
    plan = run.plan
    optimiser = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=0.01)
    began, num_batches = run.clock(), 0
    while (share := (run.clock() - began) / plan.seconds) < 1.0:
        for group in optimiser.param_groups:
            group["lr"] = plan.learning_rate * min(1.0, (num_batches + 1) / 20) * 0.5 * (1 + math.cos(math.pi * share))
        chosen = [texts[i] for i in torch.randint(len(texts), (plan.batch_size,)).tolist()]
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
            ours, theirs = _features(model, chosen)
            loss = F.cross_entropy(ours @ teacher.T, torch.softmax(theirs @ teacher.T, dim=-1))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        num_batches += 1
        if num_batches % 5 == 0:
            run.progress(f"batch {num_batches}, loss {loss.item():.3f}, {share:.0%} of the time")
    return num_batches


def _features(model: Any, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """The small model's features and the model's, where texts were drawn from them. [num_positions, hidden] each."""
    length = max(len(text.tokens) for text in texts)
    padded = torch.stack([F.pad(text.tokens[:-1], (0, length - len(text.tokens))) for text in texts])
    ours = model.model(input_ids=padded, use_cache=False).last_hidden_state
    said = torch.cat([ours[i, text.first - 1 : len(text.tokens) - 1] for i, text in enumerate(texts)])
    return said, torch.cat([text.features.float() for text in texts])  # autocast joins no float16


@torch.no_grad()
def _agreement(model: Any, texts: Sequence[Text], teacher: Tensor) -> float:
    ours, theirs = _features(model, texts)
    return ((ours @ teacher.T).argmax(dim=-1) == (theirs @ teacher.T).argmax(dim=-1)).float().mean().item()
