"""Noise that is a function of (seed, output position, token id), and of nothing else.

A counter-based generator: no state, so a request that is resumed, preempted or batched with others draws what it would
have drawn alone. The key comes from splitmix64 (Steele et al. 2014), the per-token mixing from 32-bit multiply-xorshift
rounds (the finaliser of MurmurHash3, keyed between its rounds).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def exponential_noise(seed: int, position: int, token_hashes: Tensor) -> Tensor:
    """Exponentially distributed noise, one value per token; -log of it is Gumbel noise.

    token_hashes: `hash_tokens(...)`, [num_tokens] int32 → [num_tokens] float32, in (0, 17].
    """
    key = _splitmix64(_splitmix64(seed & _MASK64) ^ position)
    x = token_hashes ^ _signed(key & 0xFFFFFFFF)
    _xor_shift(x.mul_(_signed(0x85EBCA6B)), 13)
    x.add_(_signed(key >> 32))
    _xor_shift(x.mul_(_signed(0xC2B2AE35)), 16)
    _xor_shift(x.mul_(_signed(0x9E3779B1)), 15)
    # v in (0, 1), 31 bits: small integers convert exactly, so steps are fine near 0, where the winners are.
    v = (x >> 1).bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return torch.log1p(v.neg_()).neg_()


def hash_tokens(num_tokens: int, device: torch.device) -> Tensor:
    """What `exponential_noise` mixes with its key: a fixed scrambling of the ids. [num_tokens] int32."""
    x = torch.arange(1, num_tokens + 1, dtype=torch.int32, device=device).mul_(_signed(0x9E3779B1))
    _xor_shift(x, 16)
    _xor_shift(x.mul_(_signed(0x85EBCA6B)), 13)
    return x


def _xor_shift(x: Tensor, bits: int) -> None:
    """x ^= x >>> bits, in place: int32 shifts keep the sign, so the copied sign bits are cleared."""
    x ^= (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The int32 with the same bits."""
    return x - (1 << 32) if x >= 1 << 31 else x
