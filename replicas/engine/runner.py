"""The model's side of a step: executes plans on one device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from replicas.contract import TokenLogprob
from replicas.engine.attention import KvCache, KvGeometry, pick_decode
from replicas.engine.batch import Batcher, StepBatch
from replicas.engine.model import Decoder
from replicas.engine.noise import hash_tokens
from replicas.engine.prefill import pick_chunk
from replicas.engine.sampler import Sampler, prompt_logprobs
from replicas.engine.sequence import Plan, PlanItem, Sampled, StepResult

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
    """Implements `replicas.engine.core.Runner` on a decoder and its KV cache."""

    def __init__(self, decoder: Decoder, cache: KvCache, geometry: KvGeometry) -> None:
        spec = decoder.spec
        self._decoder = decoder
        self._cache = cache
        decode, chunk = pick_decode(geometry, cache.num_blocks), pick_chunk(geometry)
        self._batcher = Batcher(geometry, decode, chunk, frozenset(spec.windows))
        self._sampler = Sampler(hash_tokens(spec.vocab_size, geometry.device), spec.eos_token_ids)

    @torch.inference_mode()
    def execute(self, plan: Plan) -> StepResult:
        """Copies blocks, computes every item, samples where asked. The plan has items."""
        if plan.copies:
            self._cache.copy(plan.copies)
        batch = self._batcher.build(plan)
        hidden = self._forward(batch)
        scored = {s.item.seq.request_id: self._score(s, hidden) for s in _scored_items(plan, batch)}
        return StepResult(self._sample(plan, batch, hidden), scored)

    def _forward(self, batch: StepBatch) -> Tensor:
        windows, layers = self._decoder.spec.windows, self._cache.layers

        def attend(layer: int, qkv: Tensor) -> Tensor:
            return batch.views[windows[layer]](qkv, layers[layer])

        return self._decoder.hidden(batch.token_ids, batch.positions, attend)

    def _sample(self, plan: Plan, batch: StepBatch, hidden: Tensor) -> tuple[Sampled, ...]:
        wanted = [i for i, item in enumerate(plan.items) if item.samples]
        if not wanted:
            return ()
        rows = hidden[[batch.last_rows[i] for i in wanted]]
        return self._sampler.sample(self._decoder.logits(rows), [plan.items[i].seq for i in wanted])

    def _score(self, scored: _Scored, hidden: Tensor) -> tuple[TokenLogprob, ...]:
        """Logprobs of the prompt's next tokens at the computed positions."""
        seq, positions = scored.item.seq, scored.positions
        num_top = seq.request.sampling.prompt_logprobs or 0
        rows = hidden[scored.row : scored.row + len(positions)]
        targets = seq.tokens[positions.start + 1 : positions.stop + 1]
        spans = (slice(i, i + _LOGIT_ROWS) for i in range(0, len(positions), _LOGIT_ROWS))
        parts = (prompt_logprobs(self._decoder.logits(rows[span]), targets[span], num_top) for span in spans)
        return tuple(chain.from_iterable(parts))


def _scored_items(plan: Plan, batch: StepBatch) -> Iterator[_Scored]:
    """Items of prompts whose logprobs are still to be delivered: a preempted answer does not score its prompt again."""
    for item, row in zip(plan.items, batch.first_rows, strict=True):
        seq = item.seq
        scored = _Scored(item, row)
        if seq.request.sampling.prompt_logprobs is not None and seq.num_output == 0 and scored.positions:
            yield scored
