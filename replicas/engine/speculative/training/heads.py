"""Trains the network of `speculative.mlp` on what the model said, by distillation.

At each position it starts from the model's feature there, goes on with the tokens that were said, and is to end up with
the model's next features and its distribution over the likeliest tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from replicas.engine.model import Decoder
from replicas.engine.speculative.mlp import MlpSpec, MlpWeights, next_state, scores
from replicas.engine.speculative.training.texts import Progress, Text, has_fast_bfloat16, likeliest_tokens


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """`seconds` of training at `learning_rate`, falling to nothing; `num_steps` tokens ahead; a batch is so many
    stretches of text, each of so many positions."""

    seconds: float
    learning_rate: float = 1e-3
    num_steps: int = 4
    num_stretches: int = 16
    length: int = 24
    feature_weight: float = 0.2
    step_decay: float = 0.8
    seed: int = 0


@dataclass(frozen=True, slots=True)
class HeadResult:
    """`agreement[k]`: how often, in texts that were kept apart, the likeliest token of step k + 1 was the model's
    likeliest (the tokens before it given). `num_batches` were trained on."""

    weights: MlpWeights
    agreement: tuple[float, ...]
    num_batches: int


class _Samples:
    """Stretches of some texts, so long that every one of `length` positions has `num_steps` more behind it."""

    def __init__(self, texts: Sequence[Text], length: int, num_steps: int) -> None:
        self.features = torch.cat([text.features for text in texts])
        self.tokens = torch.cat([text.tokens[text.first :] for text in texts])
        self._length, self._num_steps = length, num_steps
        starts, row = [], 0
        for text in texts:
            count = len(text.features)
            starts.append(torch.arange(row, row + max(0, count - length - num_steps + 1)))
            row += count
        self.starts = torch.cat(starts)

    def batch(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """features: [num_stretches, length + num_steps, hidden], and the tokens drawn from them."""
        rows = starts[:, None] + torch.arange(self._length + self._num_steps)
        return self.features[rows].float(), self.tokens[rows]


def tables(decoder: Decoder) -> tuple[Tensor, Tensor]:
    """A model's embedding and head, whatever holds them. [vocab, hidden] each."""
    spec, weights = decoder.spec, decoder.weights
    with torch.inference_mode():
        embedding = weights.embedding(torch.arange(spec.vocab_size))
        head = weights.head(torch.eye(spec.hidden_size)).T
    return embedding.clone(), head.clone()  # out of inference mode


def train_heads(
    texts: Sequence[Text], embedding: Tensor, head: Tensor, spec: MlpSpec, plan: HeadPlan, *, progress: Progress,
    clock: Callable[[], float] = time.monotonic,
) -> HeadResult:  # fmt: skip
    """Trains on all but a twentieth of the texts. embedding, head: [vocab, hidden] float32, the model's."""
    torch.manual_seed(plan.seed)
    num_kept = max(1, len(texts) // 20)
    kept, used = (_Samples(part, plan.length, plan.num_steps) for part in (texts[:num_kept], texts[num_kept:]))
    token_ids = likeliest_tokens(texts, spec.draft_vocab_size, spec.vocab_size)
    teacher = head[token_ids].clone()
    weights = _trainable(MlpWeights.fresh(spec, token_ids, teacher.clone()))
    parameters = [tensor for name, tensor in weights.tensors().items() if name != "token_ids"]
    optimiser = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=0.01)
    began, num_batches = clock(), 0
    while (share := (clock() - began) / plan.seconds) < 1.0:
        for group in optimiser.param_groups:
            group["lr"] = plan.learning_rate * min(1.0, (num_batches + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share))
        starts = used.starts[torch.randint(len(used.starts), (plan.num_stretches,))]
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
            loss = _loss(weights, used.batch(starts), embedding, teacher, plan)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        num_batches += 1
        if num_batches % 20 == 0:
            progress(f"batch {num_batches}, loss {loss.item():.3f}, {share:.0%} of the time")
    final = MlpWeights(**{name: tensor.detach() for name, tensor in weights.tensors().items()})
    shares = agreement(final, kept.batch(kept.starts[:: plan.length]), embedding, teacher, plan)
    return HeadResult(final, shares, num_batches)


def _loss(
    weights: MlpWeights, batch: tuple[Tensor, Tensor], embedding: Tensor, teacher: Tensor, plan: HeadPlan
) -> Tensor:
    features, tokens = batch
    wanted = torch.softmax(features[:, 1:] @ teacher.T, dim=-1)
    total = torch.zeros(())
    for step, state in enumerate(_states(weights, features, tokens, embedding, plan)):
        ahead = slice(step, step + plan.length)
        divergence = F.cross_entropy(scores(state, weights).flatten(0, 1), wanted[:, ahead].flatten(0, 1))
        drift = F.smooth_l1_loss(state, features[:, 1:][:, ahead])
        total = total + plan.step_decay**step * (divergence + plan.feature_weight * drift)
    return total


def _states(
    weights: MlpWeights, features: Tensor, tokens: Tensor, embedding: Tensor, plan: HeadPlan
) -> Iterator[Tensor]:
    """The network's states, step by step, from every position of the stretches: [num_stretches, length, hidden]."""
    state = features[:, : plan.length]
    for step in range(plan.num_steps):
        state = next_state(state, F.embedding(tokens[:, step : step + plan.length], embedding), weights)
        yield state


@torch.no_grad()
def agreement(
    weights: MlpWeights, batch: tuple[Tensor, Tensor], embedding: Tensor, teacher: Tensor, plan: HeadPlan
) -> tuple[float, ...]:
    """See `HeadResult.agreement`."""
    features, tokens = batch
    likeliest = (features[:, 1:] @ teacher.T).argmax(dim=-1)
    return tuple(
        (scores(state, weights).argmax(dim=-1) == likeliest[:, step : step + plan.length]).float().mean().item()
        for step, state in enumerate(_states(weights, features, tokens, embedding, plan))
    )


def _trainable(weights: MlpWeights) -> MlpWeights:
    return replace(
        weights, **{n: t.detach().requires_grad_() for n, t in weights.tensors().items() if n != "token_ids"}
    )
