"""The noise is uniform along every axis of its key, independent between them, and a function of the key alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from replicas.engine.noise import exponential_noise, hash_tokens

CPU = torch.device("cpu")
SEEDS = [0, 1, 12345, 2**31, 2**63 - 1, 2**63]


def uniforms(seed: int, position: int, hashes: torch.Tensor) -> np.ndarray:
    return (1 - torch.exp(-exponential_noise(seed, position, hashes).double())).numpy()


def chi_square_z(values: np.ndarray, bins: int = 64) -> float:
    """How many standard deviations the chi-square statistic of uniformity lies from its mean."""
    counts, _ = np.histogram(values, bins=bins, range=(0, 1))
    expected = len(values) / bins
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - (bins - 1)) / math.sqrt(2 * (bins - 1)))


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_uniform_over_tokens(seed: int) -> None:
    hashes = hash_tokens(49152, CPU)
    assert max(abs(chi_square_z(uniforms(seed, position, hashes))) for position in range(20)) < 5


@pytest.mark.parametrize("token_id", [0, 1, 777, 49151])
def test_noise_of_one_token_is_uniform_over_positions_and_over_seeds(token_id: int) -> None:
    hashes = hash_tokens(49152, CPU)[token_id : token_id + 1]
    over_positions = np.concatenate([uniforms(5, position, hashes) for position in range(10000)])
    over_seeds = np.concatenate([uniforms(seed, 5, hashes) for seed in range(10000)])
    assert abs(chi_square_z(over_positions)) < 5
    assert abs(chi_square_z(over_seeds)) < 5


def test_neighbouring_tokens_positions_and_seeds_are_uncorrelated() -> None:
    hashes = hash_tokens(49152, CPU)
    base = uniforms(9, 9, hashes)
    keys = [(9, 10), (10, 9), (9 + 2**32, 9)]
    others = [uniforms(*key, hashes) for key in keys] + [np.roll(base, 1), np.roll(base, 64)]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / math.sqrt(len(base))


def test_pairs_of_neighbouring_tokens_fill_the_square_evenly() -> None:
    hashes = hash_tokens(49152, CPU)
    cells = np.zeros((8, 8))
    for position in range(10):
        values = uniforms(3, position, hashes)
        cells += np.histogram2d(values[:-1:2], values[1::2], bins=8, range=((0, 1), (0, 1)))[0]
    expected = cells.sum() / 64
    statistic = ((cells - expected) ** 2 / expected).sum()
    assert abs(statistic - 63) < 5 * math.sqrt(126)


def test_noise_is_finite_and_positive() -> None:
    hashes = hash_tokens(200_000, CPU)
    noise = torch.stack([exponential_noise(1, position, hashes) for position in range(50)])
    assert noise.isfinite().all() and (noise > 0).all()


def test_noise_of_a_token_does_not_depend_on_the_size_of_the_vocabulary() -> None:
    small, large = hash_tokens(100, CPU), hash_tokens(5000, CPU)
    assert torch.equal(exponential_noise(7, 3, small), exponential_noise(7, 3, large)[:100])


def test_noise_does_not_change_its_inputs() -> None:
    hashes = hash_tokens(100, CPU)
    before = hashes.clone()
    first, second = exponential_noise(7, 3, hashes), exponential_noise(7, 3, hashes)
    assert torch.equal(hashes, before) and torch.equal(first, second)
