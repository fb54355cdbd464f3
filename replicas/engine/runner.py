"""The model's side of a step: executes plans on one device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from replicas.contract import TokenLogprob
from replicas.engine.attention import DecodeKernel, KvCache, KvGeometry, pick_decode
from replicas.engine.batch import Batcher, StepBatch
from replicas.engine.kernels.attention import KernelDecode, has_decode
from replicas.engine.lora.store import LoraStore
from replicas.engine.model import Decoder
from replicas.engine.noise import hash_tokens
from replicas.engine.prefill import pick_chunk
from replicas.engine.sampler import Sampler, prompt_logprobs
from replicas.engine.sequence import Plan, PlanItem, Sampled, StepResult
from replicas.engine.speculative.features import FeatureTap
from replicas.engine.verify import pick_verify

# Rows of logits held at once when a prompt is scored: 64 * 49,152 floats are 12 MiB.
_LOGIT_ROWS = 64


@dataclass(frozen=True, slots=True)
class _Scored:
    """A plan item whose prompt is scored, and its first row in the batch."""

    item: PlanItem
    row: int

    @property
    def positions(self) -> range:
        """Positions computed in this step that have a next token in the prompt."""
        start = self.item.start
        return range(start, min(start + self.item.num_tokens, self.item.seq.num_prompt - 1))


class TorchRunner:
    """Implements `replicas.engine.core.Runner` on a decoder and its KV cache. `tap`, where set, is told the features of
    every step."""

    def __init__(
        self, decoder: Decoder, cache: KvCache, geometry: KvGeometry, adapters: LoraStore | None = None
    ) -> None:
        spec = decoder.spec
        self.tap: FeatureTap | None = None
        self.decoder = decoder
        self._cache = cache
        self._device = geometry.device
        compiled = _compiled(geometry, cache)
        self._batcher = Batcher(
            geometry,
            compiled or pick_decode(geometry, cache.num_blocks),
            pick_chunk(geometry, compiled),
            frozenset(spec.windows),
            adapters,
            pick_verify(compiled),
        )
        self._sampler = Sampler(hash_tokens(spec.vocab_size, geometry.device), spec.eos_token_ids)

    @torch.inference_mode()
    def execute(self, plan: Plan) -> StepResult:
        """Copies blocks, computes every item, samples where asked. The plan has items."""
        if plan.copies:
            self._cache.copy(plan.copies)
        batch = self._batcher.build(plan)
        hidden = self._forward(batch)
        scored = {s.item.seq.request_id: self._score(s, hidden) for s in _scored_items(plan, batch)}
        return self._sample(plan, batch, hidden, scored)

    def _forward(self, batch: StepBatch) -> Tensor:
        windows, layers = self.decoder.spec.windows, self._cache.layers

        def attend(layer: int, qkv: Tensor) -> Tensor:
            return batch.views[windows[layer]](qkv, layers[layer])

        adapt = None if batch.lora is None else batch.lora.add
        return self.decoder.hidden(batch.token_ids, batch.positions, attend, adapt)

    def _sample(
        self, plan: Plan, batch: StepBatch, hidden: Tensor, scored: dict[str, tuple[TokenLogprob, ...]]
    ) -> StepResult:
        sampling = [(item, last) for item, last in zip(plan.items, batch.last_rows, strict=True) if item.samples]
        if not sampling:
            return StepResult((), scored)
        rows = [row for item, last in sampling for row in range(last - len(item.drafts), last + 1)]
        points = [point for item, _ in sampling for point in item.points]
        features = self.decoder.features(hidden[rows])
        drawn = iter(self._sampler.sample(self.decoder.scores(features), points))
        taken: list[tuple[Sampled, ...]] = []
        draws: dict[str, tuple[int, ...]] = {}
        first = 0
        for item, _ in sampling:
            mine = tuple(islice(drawn, len(item.drafts) + 1))
            draws[item.seq.request_id] = tuple(token.token_id for token in mine)
            accepted = item.drafts.accepted(draws[item.seq.request_id])
            self._keep(item, accepted)
            if self.tap is not None:
                newest = features[first + (0, *accepted)[-1]]
                self.tap.take(item.seq.request_id, item.seq.num_tokens - 1 + len(accepted), newest)
            first += len(mine)
            taken.append(tuple(mine[row] for row in (0, *accepted)))
        return StepResult(tuple(taken), scored, draws)

    def _keep(self, item: PlanItem, accepted: tuple[int, ...]) -> None:
        """Moves the KV of confirmed drafts from where their tree had them to their places behind one another."""
        moves = [(item.start + row, item.start + depth) for depth, row in enumerate(accepted, 1) if row != depth]
        if moves:
            slots = np.array(moves)
            source, target = (torch.from_numpy(self._batcher.slot_rows(item.seq, side)) for side in slots.T)
            self._cache.move(source.to(self._device), target.to(self._device))

    def _score(self, scored: _Scored, hidden: Tensor) -> tuple[TokenLogprob, ...]:
        """Logprobs of the prompt's next tokens at the computed positions."""
        seq, positions = scored.item.seq, scored.positions
        num_top = seq.request.sampling.prompt_logprobs or 0
        rows = hidden[scored.row : scored.row + len(positions)]
        targets = seq.tokens[positions.start + 1 : positions.stop + 1]
        spans = (slice(i, i + _LOGIT_ROWS) for i in range(0, len(positions), _LOGIT_ROWS))
        parts = (prompt_logprobs(self.decoder.logits(rows[span]), targets[span], num_top) for span in spans)
        return tuple(chain.from_iterable(parts))


def _compiled(geometry: KvGeometry, cache: KvCache) -> DecodeKernel | None:
    """The compiled kernel for single tokens, where there is one for this decoder."""
    if cache.kernels is None or not has_decode(geometry):
        return None
    return partial(KernelDecode, cache.kernels)


def _scored_items(plan: Plan, batch: StepBatch) -> Iterator[_Scored]:
    """Items of prompts whose logprobs are still to be delivered: a preempted answer does not score its prompt again."""
    for item, row in zip(plan.items, batch.first_rows, strict=True):
        seq = item.seq
        scored = _Scored(item, row)
        if seq.request.sampling.prompt_logprobs is not None and seq.num_output == 0 and scored.positions:
            yield scored
