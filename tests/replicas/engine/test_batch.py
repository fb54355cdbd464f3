"""Rows of a packed batch: each token's place in the cache, its position, and where an item's rows lie."""

from __future__ import annotations

import random

import torch

from replicas.contract import GenerateRequest, SamplingParams, pack_tokens
from replicas.engine.attention import KvGeometry
from replicas.engine.batch import Batcher
from replicas.engine.drafts import Drafts
from replicas.engine.kv_rows import KvRows
from replicas.engine.prefill import Chunk
from replicas.engine.sequence import Plan, PlanItem, Sequence

GEOMETRY = KvGeometry(4, 2, 16, 4, torch.float32, torch.device("cpu"))
HEADS = 2 * GEOMETRY.num_kv_heads


class NoAttention:
    def __init__(self, geometry: KvGeometry, what: object) -> None: ...

    def __call__(self, rows: torch.Tensor, cache: KvRows) -> torch.Tensor:
        raise NotImplementedError


def chunk(geometry: KvGeometry, what: Chunk) -> NoAttention:
    return NoAttention(geometry, what)


def drawn_item(draw: random.Random, name: str) -> PlanItem:
    """A single token, a chunk, or guesses in a chain or in a tree; blocks lie anywhere."""
    num_tokens = draw.randint(2, 30)
    prompt = pack_tokens([draw.randrange(999) for _ in range(num_tokens)])
    sampling = SamplingParams(max_tokens=5, seed=0, temperature=0.0)
    seq = Sequence.from_request(GenerateRequest(request_id=name, prompt=prompt, sampling=sampling), 0.0)
    seq.block_ids = draw.sample(range(100), 10)
    kind = draw.choice(["decode", "chunk", "chain", "tree"])
    if kind == "decode":
        return PlanItem(seq, num_tokens - 1, 1, samples=True)
    if kind == "chunk":
        start = draw.randrange(num_tokens - 1)
        return PlanItem(seq, start, draw.randint(1, num_tokens - start), samples=True)
    count = draw.randint(1, 6)
    parents = range(count) if kind == "chain" else [draw.randint(0, row) for row in range(count)]
    return PlanItem(seq, num_tokens - 1, 1 + count, samples=True, drafts=Drafts(tuple(range(count)), tuple(parents)))


def test_every_token_has_its_slot_and_its_position() -> None:
    batcher = Batcher(GEOMETRY, NoAttention, chunk, frozenset([None, 8]))
    draw = random.Random(1)
    for _ in range(100):
        items = [drawn_item(draw, str(i)) for i in range(draw.randint(1, 8))]
        batch = batcher.build(Plan(tuple(items)))
        assert batch.views[None].writes is batch.views[8].writes
        writes = batch.views[None].writes.view(-1, HEADS)
        for item, first, last in zip(items, batch.first_rows, batch.last_rows, strict=True):
            assert batch.token_ids[first : last + 1].tolist() == list(item.token_ids)
            for row in range(item.num_tokens):
                depth = item.drafts.depths[max(0, row - item.num_known + 1)]
                assert batch.positions[first + row] == item.start + min(row, item.num_known - 1) + depth
                slot = item.start + row
                block, offset = item.seq.block_ids[slot // GEOMETRY.block_size], slot % GEOMETRY.block_size
                places = [(block * HEADS + head) * GEOMETRY.block_size + offset for head in range(HEADS)]
                assert writes[first + row].tolist() == places
