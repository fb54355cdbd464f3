"""Codes of a few bits in 32-bit words, lowest bits first."""

from __future__ import annotations

import torch
from torch import Tensor


def unpack_words(words: Tensor, bits: int, dim: int) -> Tensor:
    """int32 words along `dim` → codes along `dim`, 32 / bits times as many. uint8"""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes: Tensor = words.movedim(dim, -1).unsqueeze(-1) >> shifts & 2**bits - 1
    return codes.to(torch.uint8).flatten(-2).movedim(-1, dim).contiguous()


def pack_words(codes: Tensor, bits: int, dim: int) -> Tensor:
    """The inverse of `unpack_words`; the length along `dim` is filled up with zeros to whole words. int32"""
    per_word = 32 // bits
    codes = codes.movedim(dim, -1).to(torch.int64)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_word))
    codes = codes.reshape(*codes.shape[:-1], -1, per_word)
    words: Tensor = (codes << torch.arange(0, 32, bits)).sum(-1)
    return words.to(torch.int32).movedim(-1, dim).contiguous()  # bit 31 is int32's sign: to() wraps, as it should
