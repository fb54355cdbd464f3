"""A learned head that guesses: a small recurrent network on the model's last hidden state.

    feature of token t ─┐           state 1 ─► logits: token t + 2 ─┐          state 2 ─► logits: token t + 3 …
                        ├─► MLP ──────┘                             ├─► MLP ─────┘
    embedding of t + 1 ─┘                         embedding of t + 2 ─┘

Like Medusa's heads (Cai et al. 2024) it reads one hidden state and needs no KV cache; like EAGLE (Li et al. 2024) and
Hydra (Ankner et al. 2024) it goes on from its own guesses, in the space of the model's features. Its logits cover the
`draft_vocab_size` likeliest tokens only, since the product with a whole vocabulary would cost more than all the rest
(FR-Spec, Zhao et al. 2025, and EAGLE-3 do so too).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from replicas.contract import EngineError
from replicas.engine.drafts import Drafts
from replicas.engine.linear import Linear, make_linear
from replicas.engine.noise import exponential_noise
from replicas.engine.sampler import GREEDY_BELOW, truncate
from replicas.engine.sequence import Plan, StepResult
from replicas.engine.speculative.drafter import Guess, Wish
from replicas.engine.weights import Embedding

ARCHITECTURE = "WarmgateMlpSpeculator"
_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """Sizes: the model's `hidden_size` and `vocab_size`, the network's own `inner_size` and `draft_vocab_size`."""

    hidden_size: int
    vocab_size: int
    inner_size: int
    draft_vocab_size: int


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """`token_ids[i]` is the token that row i of `head` scores."""

    state_norm: Tensor  # [hidden]
    token_norm: Tensor  # [hidden]
    gate_up: Tensor  # [2 * inner, 2 * hidden]
    down: Tensor  # [hidden, inner]
    head: Tensor  # [draft_vocab, hidden]
    token_ids: Tensor  # [draft_vocab] int64

    @classmethod
    def fresh(cls, spec: MlpSpec, token_ids: Tensor, head: Tensor) -> MlpWeights:
        """Before training: states pass through unchanged, and are scored as the model scores them."""
        hidden, inner = spec.hidden_size, spec.inner_size
        generator = torch.Generator().manual_seed(0)
        return cls(
            state_norm=torch.ones(hidden),
            token_norm=torch.ones(hidden),
            gate_up=torch.randn(2 * inner, 2 * hidden, generator=generator) * (2 * hidden) ** -0.5,
            down=torch.randn(hidden, inner, generator=generator) * 0.1 * inner**-0.5,
            head=head,
            token_ids=token_ids,
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> MlpWeights:
        """The weights on another device, in another dtype."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return MlpWeights(**{name: t if name == "token_ids" else t.to(dtype) for name, t in tensors.items()})

    def tensors(self) -> dict[str, Tensor]:
        """By name, as in the checkpoint."""
        return {name: getattr(self, name) for name in self.__slots__}


def next_state(state: Tensor, embedding: Tensor, weights: MlpWeights) -> Tensor:
    """One step of the network, as it is trained. state, embedding: [num_rows, hidden] → [num_rows, hidden]."""
    both = torch.cat([_norm(state, weights.state_norm), _norm(embedding, weights.token_norm)], dim=-1)
    return state + F.linear(_gated(F.linear(both, weights.gate_up)), weights.down)


def scores(state: Tensor, weights: MlpWeights) -> Tensor:
    """[num_rows, hidden] → [num_rows, draft_vocab], logits of `token_ids`."""
    return F.linear(state, weights.head)


def save(folder: Path, spec: MlpSpec, weights: MlpWeights, about: Mapping[str, object]) -> None:
    """Writes `config.json`, with what is to be known `about` it, and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [ARCHITECTURE], **asdict(spec), **about}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in weights.tensors().items()}, folder / "model.safetensors")


def load(folder: Path, hidden_size: int, vocab_size: int) -> MlpWeights:
    """Reads what `save` wrote. Raises EngineError when it is missing or broken, or another model's."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if ARCHITECTURE not in config.get("architectures", ()):
            raise EngineError(f"{folder} is no {ARCHITECTURE}: {config.get('architectures')}")
        spec = MlpSpec(**{name: int(config[name]) for name in MlpSpec.__slots__})
        tensors = load_file(folder / "model.safetensors")
        weights = MlpWeights(**{name: tensors[name] for name in MlpWeights.__slots__})
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise EngineError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error
    if (spec.hidden_size, spec.vocab_size) != (hidden_size, vocab_size):
        theirs, ours = f"{spec.hidden_size=} {spec.vocab_size=}", f"{hidden_size=} {vocab_size=}"
        raise EngineError(f"{folder} was trained for another model: it has {theirs}, the model {ours}")
    _check_shapes(folder, spec, weights)
    return weights


def _check_shapes(folder: Path, spec: MlpSpec, weights: MlpWeights) -> None:
    hidden, inner, vocab = spec.hidden_size, spec.inner_size, spec.draft_vocab_size
    expected = {
        "state_norm": (hidden,), "token_norm": (hidden,), "gate_up": (2 * inner, 2 * hidden), "down": (hidden, inner),
        "head": (vocab, hidden), "token_ids": (vocab,),
    }  # fmt: skip
    for name, tensor in weights.tensors().items():
        if tuple(tensor.shape) != expected[name]:
            raise EngineError(f"{folder}: {name} has shape {tuple(tensor.shape)}, config.json implies {expected[name]}")
    if not 0 <= int(weights.token_ids.min()) <= int(weights.token_ids.max()) < spec.vocab_size:
        raise EngineError(f"{folder}: token_ids holds ids outside the vocabulary of {spec.vocab_size}")


class MlpDrafter:
    """Guesses for all wishes together, token by token. Also the tap that gives it what it starts from.

    `weights` are on the model's device in its dtype; `embedding` is the model's, `hashes` its `noise.hash_tokens`.
    """

    def __init__(self, weights: MlpWeights, embedding: Embedding, hashes: Tensor) -> None:
        self._weights = weights
        self._embedding = embedding
        self._gate_up: Linear = make_linear(weights.gate_up)
        self._down: Linear = make_linear(weights.down)
        self._head: Linear = make_linear(weights.head)
        self._hashes = hashes[weights.token_ids]
        self._features: dict[str, tuple[int, Tensor]] = {}

    @property
    def is_settled(self) -> bool:
        """Always: nothing is to be caught up with."""
        return True

    def take(self, request_id: str, position: int, feature: Tensor) -> None:
        """See `FeatureTap`."""
        self._features[request_id] = (position, feature)

    @torch.inference_mode()
    def draft(self, wishes: Rows[Wish]) -> Mapping[str, Guess]:
        """See `Drafter.draft`. Who has no fresh feature gets no guess."""
        ready = [wish for wish in wishes if self._is_fresh(wish)]
        if not ready:
            return {}
        state = torch.stack([self._features[wish.seq.request_id][1] for wish in ready])
        token_ids = torch.tensor([wish.seq.tokens[-1] for wish in ready], device=state.device)
        drawn: list[list[int]] = []
        for depth in range(max(wish.max_drafts for wish in ready)):
            state = self._next(state, self._embedding(token_ids))
            token_ids = self._draw(self._head(state).float(), ready, depth)
            drawn.append(token_ids.tolist())
        return {
            wish.seq.request_id: Guess(Drafts.chain([row[i] for row in drawn[: wish.max_drafts]]))
            for i, wish in enumerate(ready)
        }

    def observe(self, plan: Plan, result: StepResult) -> None:
        """Nothing but features, which come by `take`."""

    def retain(self, running: frozenset[str]) -> None:
        """See `Drafter.retain`."""
        if len(self._features) > len(running):
            self._features = {name: held for name, held in self._features.items() if name in running}

    def _is_fresh(self, wish: Wish) -> bool:
        position, _ = self._features.get(wish.seq.request_id, (None, None))
        return position == wish.seq.num_tokens - 2

    def _next(self, state: Tensor, embedding: Tensor) -> Tensor:
        weights = self._weights
        both = torch.cat([_norm(state, weights.state_norm), _norm(embedding, weights.token_norm)], dim=-1)
        return state + self._down(_gated(self._gate_up(both)))

    def _draw(self, logits: Tensor, wishes: Rows[Wish], depth: int) -> Tensor:
        """As the model draws, with its noise at that position; penalties and bans are left to it."""
        for row, wish in zip(logits, wishes, strict=True):
            params = wish.seq.request.sampling
            if params.temperature >= GREEDY_BELOW:
                row.div_(params.temperature)
                truncate(row, params)
                row.sub_(exponential_noise(params.seed, wish.seq.num_output + depth, self._hashes).log_())
        return self._weights.token_ids[torch.argmax(logits, dim=-1)]


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, _EPS)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
