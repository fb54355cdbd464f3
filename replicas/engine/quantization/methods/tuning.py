"""Scales and norms made better once every code is chosen, with the whole model in view.

Methods go through a model layer by layer and lose least in each; what that does to predictions they do not see. Here
scales and norms, some percent of a model, follow the gradient of the Kullback-Leibler divergence between what the
original and the quantised model predict behind each token of the calibration text (training step sizes alone: the
second phase of EfficientQAT, Chen et al. 2024; norms: Norm Tweaking, Li et al. 2023). Codes stay, and so the format.

All layers are in memory at once, and a step computes a sequence forwards and back: minutes for a small model, many
hours for a large one on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from replicas.engine.families import DecoderSpec
from replicas.engine.quantization.matrix import Quantised, rounded_inputs
from replicas.engine.quantization.methods.textbook import MODULES, Layer, Original, Samples, forget
from replicas.engine.quantization.source import EMBEDDING

Report: TypeAlias = Callable[[str, int, int], None]
"""(what is done: layers or tuning steps, how many, how many in all)."""

LEARNING_RATE = 5e-4  # of changes relative to what was there
_BETAS = (0.9, 0.95)
_WARM_UP = 10
_LAST_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class QuantisedLayer:
    """`kept`: the layer's tensors that are no quantised matrices, by name within it; `matrices`: by module."""

    kept: dict[str, Tensor]
    matrices: dict[str, Quantised]

    @classmethod
    def of(cls, layer: Layer, matrices: dict[str, Quantised]) -> QuantisedLayer:
        """A layer after its matrices were quantised."""
        replaced = {f"{module}.weight" for module in matrices}
        return cls({name: tensor for name, tensor in layer.tensors.items() if name not in replaced}, matrices)


def tuned(
    layers: Sequence[QuantisedLayer], original: Original, sequences: Sequence[Sequence[int]], report: Report
) -> list[QuantisedLayer]:
    """The same layers with better scales and norms; one step a sequence."""
    with torch.enable_grad():
        ends = Ends.read(original)
        pairs = list(zip(sequences, ends.hidden_of(original, sequences, report), strict=True))
        Random(0).shuffle(pairs)  # neighbours in a text are alike
        student = [Tunable.of(i, original.spec, layer) for i, layer in enumerate(layers)]
        changes = [change for layer in student for change in layer.changes.values()]
        optimiser = torch.optim.Adam(changes, lr=LEARNING_RATE, betas=_BETAS)
        for step, (tokens, target) in enumerate(pairs):
            report("tuning steps", step, len(pairs))
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * _share(step, len(pairs))
            optimiser.zero_grad()
            loss = ends.divergence(_through(student, ends.embedded(tokens)), target)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        report("tuning steps", len(pairs), len(pairs))
        return [layer.result() for layer in student]


def _share(step: int, num_steps: int) -> float:
    """Of the learning rate: up, then down along a cosine."""
    down = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return min(1.0, (step + 1) / _WARM_UP) * max(_LAST_SHARE, down)


def _through(layers: Iterable[Tunable], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer.forward(x)
    return x


@dataclass(frozen=True, slots=True)
class Ends:
    """What lies before and behind the layers, float32. embedding, head: [vocab, hidden], norm: [hidden]"""

    embedding: Tensor
    head: Tensor
    norm: Tensor
    spec: DecoderSpec

    @classmethod
    def read(cls, original: Original) -> Ends:
        """Those of a model."""
        embedding = original.source.get(f"{EMBEDDING}.weight").float()
        head = original.source.get(f"{original.head}.weight").float() if original.head else embedding
        return cls(embedding, head, original.source.get("model.norm.weight").float(), original.spec)

    def embedded(self, tokens: Sequence[int]) -> Tensor:
        """[num_tokens, hidden]"""
        return self.embedding[list(tokens)]

    def hidden_of(self, original: Original, sequences: Sequence[Sequence[int]], report: Report) -> list[Tensor]:
        """What the original makes of each sequence before its last norm. [num_tokens, hidden] each"""
        num_layers = original.spec.num_layers
        with torch.no_grad():
            samples = Samples([self.embedded(tokens) for tokens in sequences])
            for i in range(num_layers):
                report("layers of the original", i, num_layers)
                samples.advance(original.layer(i))
        report("layers of the original", num_layers, num_layers)
        return samples.hidden

    def divergence(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Nats a token between what two last hidden states predict."""
        with torch.no_grad():
            wanted = self._log_probabilities(target)
        return F.kl_div(self._log_probabilities(hidden), wanted, log_target=True, reduction="batchmean")

    def _log_probabilities(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden, hidden.shape[-1:], self.norm, self.spec.rms_norm_eps)
        return torch.log_softmax(normed @ self.head.t(), dim=-1)


@dataclass(frozen=True, slots=True)
class Tunable:
    """One layer. `changes`: of scales by module, of norms by tensor's name, relative, at first 0."""

    index: int
    spec: DecoderSpec
    layer: QuantisedLayer
    steps: dict[str, Tensor]  # codes less zero points, in the matrix's own order of columns, int8
    changes: dict[str, Tensor]

    @classmethod
    def of(cls, index: int, spec: DecoderSpec, layer: QuantisedLayer) -> Tunable:
        steps = {module: _steps(matrix) for module, matrix in layer.matrices.items()}
        sizes = {module: matrix.scale for module, matrix in layer.matrices.items()}
        sizes |= {name: tensor for name, tensor in layer.kept.items() if name.endswith("norm.weight")}
        changes = {name: torch.zeros(size.shape, requires_grad=True) for name, size in sizes.items()}
        return cls(index, spec, layer, steps, changes)

    def forward(self, x: Tensor) -> Tensor:
        """[num_tokens, hidden] → the same shape."""
        kept = {name: self._changed(name, tensor) for name, tensor in self.layer.kept.items()}
        weights = {f"{module}.weight": self._weight(module) for module in MODULES}
        return Layer(self.index, self.spec, kept | weights, self._rounded).forward(x, forget)

    def result(self) -> QuantisedLayer:
        """The layer as it is now, scales as they will be stored."""
        with torch.no_grad():
            kept = {name: self._changed(name, tensor) for name, tensor in self.layer.kept.items()}
            return QuantisedLayer(kept, dict(self._matrices()))

    def _matrices(self) -> Iterator[tuple[str, Quantised]]:
        for module, matrix in self.layer.matrices.items():
            scale = self._changed(module, matrix.scale)
            yield module, replace(matrix, scale=scale if matrix.offset is None else scale.half().float())

    def _changed(self, name: str, tensor: Tensor) -> Tensor:
        change = self.changes.get(name)
        return tensor if change is None else tensor * (1 + change)

    def _rounded(self, module: str, x: Tensor) -> Tensor:
        """A module's input as its matrix takes it; the gradient passes as if nothing had been rounded."""
        with torch.no_grad():
            error = rounded_inputs(x, self.layer.matrices[module]) - x
        return x + error

    def _weight(self, module: str) -> Tensor:
        matrix, steps = self.layer.matrices[module], self.steps[module]
        scale = self._changed(module, matrix.scale)
        weight = (steps.view(matrix.rows, -1, matrix.group) * scale[:, :, None]).view(steps.shape)
        return weight if matrix.order is None else weight[:, torch.argsort(matrix.order)]


def _steps(matrix: Quantised) -> Tensor:
    assert matrix.columns % matrix.group == 0
    if matrix.offset is None:
        return matrix.values().to(torch.int8)
    zero = matrix.offset.repeat_interleave(matrix.group, dim=1)
    return (matrix.values() - zero).to(torch.int8)
