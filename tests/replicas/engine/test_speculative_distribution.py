"""Checked guesses leave the distribution of what is said as it is: chi-square over a hundred thousand samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from replicas.engine.drafts import Drafts
from replicas.engine.noise import hash_tokens
from replicas.engine.sampler import Sampler
from replicas.engine.sequence import SamplePoint
from tests.replicas.engine.tiny import make_sequence

TABLE = torch.randn(9, 9, generator=torch.Generator().manual_seed(4)) * 1.5
SMALLER = TABLE + torch.randn(9, 9, generator=torch.Generator().manual_seed(5))
NUM_SAMPLES = 33_400  # 100,200 over the three temperatures


@torch.inference_mode()  # as in the engine
def drawn(table: torch.Tensor, points: list[SamplePoint]) -> list[int]:
    """What a model says that looks at the last token alone: `table[last]` are its logits."""
    sampler = Sampler(hash_tokens(9, torch.device("cpu")), (8,))
    last = [point.path[-1] if point.path else point.seq.tokens[-1] for point in points]
    return [token.token_id for token in sampler.sample(table[last].clone(), points)]


@pytest.mark.parametrize(
    "temperature", [pytest.param(0.5, marks=pytest.mark.slow), 1.0, pytest.param(1.6, marks=pytest.mark.slow)]
)
def test_two_tokens_of_a_hundred_thousand_requests_follow_the_models_distribution(temperature: float) -> None:
    """A draft model with another distribution guesses the first token, with the noise that the model will have."""
    seqs = [make_sequence([3], seed=seed, temperature=temperature) for seed in range(NUM_SAMPLES)]
    starts = [SamplePoint(seq) for seq in seqs]
    guesses = drawn(SMALLER, starts)
    first = drawn(TABLE, starts)
    checked = drawn(TABLE, [SamplePoint(seq, (guess,)) for seq, guess in zip(seqs, guesses, strict=True)])
    rows = [Drafts.chain([guess]).accepted(draws) for guess, *draws in zip(guesses, first, checked, strict=True)]
    rejected = [SamplePoint(seq, (token,)) for seq, token, row in zip(seqs, first, rows, strict=True) if not row]
    later = iter(drawn(TABLE, rejected))  # the next step draws what follows a wrong guess
    second = [token if row else next(later) for token, row in zip(checked, rows, strict=True)]
    p, q = (torch.softmax(table / temperature, dim=-1).double() for table in (TABLE, SMALLER))
    expected = (p[3][:, None] * p).numpy() * NUM_SAMPLES
    counts = np.zeros((9, 9))
    np.add.at(counts, (np.array(first), np.array(second)), 1)
    common = expected >= 8
    statistic = ((counts - expected) ** 2 / expected)[common].sum()
    assert abs(statistic - common.sum()) < 4 * math.sqrt(2 * common.sum())
    distance = 0.5 * float((p[3] - q[3]).abs().sum())
    accepted = np.mean([bool(row) for row in rows])
    assert (1 - distance) / (1 + distance) - 0.01 <= accepted <= 1 - distance + 0.01
