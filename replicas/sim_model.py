"""A language model without weights: the next token is a hash of the whole context.

    state(0) = hash(adapter)      state(i + 1) = mix(state(i), token(i))      next token = f(state(n))

One wrong, missing or exchanged token anywhere in the context changes everything after it, so crossed requests, a wrong
cache hit or a wrong resume show up in the text. The distribution over next tokens is fixed in shape: the r-th most
likely token has probability 2^-(r+1), what is left is spread over the rest of the vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from replicas.contract import SamplingParams, TokenLogprob
from replicas.engine.sequence import Sampled

MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15
MAX_RANKS = 20
_LN2 = math.log(2.0)
_EOS_DRAW = 0x5851F42D4C957F2D


@lru_cache(maxsize=4096)
def root_state(adapter: str | None) -> int:
    """The state before the first token: the base model's, or an adapter's."""
    digest = hashlib.blake2b((adapter or "").encode(), digest_size=8, person=b"sim-model").digest()
    return int.from_bytes(digest, "little")


def next_state(state: int, token_id: int) -> int:
    """The state after one more token. Bijective in `state`, so equal contexts alone have equal states (but for luck).

    `SimRunner` has this line inlined.
    """
    state = ((state ^ token_id) * STEP) & MASK
    return state ^ (state >> 32)


def scramble(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every bit depends on every bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@dataclass(frozen=True, slots=True)
class SimModel:
    """What the model can say: tokens of `alphabet`, and the first of `eos_token_ids` with probability
    1 / `mean_output_tokens` a token, never when that is None."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    alphabet: tuple[int, ...]
    mean_output_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.alphabet or not all(0 <= token_id < self.vocab_size for token_id in self.alphabet):
            raise ValueError(f"the alphabet must be ids of the vocabulary: {self.vocab_size=} {self.alphabet[:4]=}")
        if self.mean_output_tokens is not None and not self.eos_token_ids:
            raise ValueError("an answer can only end by itself when there is an end-of-sequence token")

    @property
    def num_ranks(self) -> int:
        return min(MAX_RANKS, len(self.alphabet))

    def sample(
        self, state: int, sampling: SamplingParams, num_output: int, allowed: Sequence[int] | None = None
    ) -> Sampled:
        """The next token after `num_output` outputs. Greedy takes the likeliest; else the draw depends on (seed,
        position) as well. `allowed`: the only tokens there are, instead of the alphabet."""
        noise = 0
        if sampling.temperature > 0:
            noise = scramble((sampling.seed * STEP + num_output + 1) & MASK)
        token_id = None if allowed else self._eos(state ^ noise, sampling, num_output)
        if token_id is None:
            # Trailing zeros of a random number: r with probability 2^-(r+1).
            draw = scramble(state ^ noise) | (1 << (self.num_ranks - 1))
            rank = (draw & -draw).bit_length() - 1 if noise else 0
            token_id = _ranked(allowed or self.alphabet, state, rank)
        if sampling.logprobs is None:
            return Sampled(token_id)
        return Sampled(token_id, self.logprob(state, token_id, sampling.logprobs))

    def logprob(self, state: int, token_id: int, num_top: int) -> TokenLogprob:
        """The logprob of `token_id` in this state, with the `num_top` likeliest tokens."""
        top = tuple((_ranked(self.alphabet, state, rank), -(rank + 1) * _LN2) for rank in range(self.num_ranks))
        num_rest = max(1, self.vocab_size - self.num_ranks)
        logprob = dict(top).get(token_id, -self.num_ranks * _LN2 - math.log(num_rest))
        return TokenLogprob(token_id, logprob, top[:num_top])

    def _eos(self, draw: int, sampling: SamplingParams, num_output: int) -> int | None:
        if self.mean_output_tokens is None or sampling.ignore_eos or num_output < sampling.min_tokens:
            return None
        ends = scramble(draw ^ _EOS_DRAW) % self.mean_output_tokens == 0
        return self.eos_token_ids[0] if ends else None

    def generate(self, prompt: Iterable[int], sampling: SamplingParams, adapter: str | None = None) -> list[int]:
        """The slow obvious way, without cache or steps: the oracle of the engine's tests. Ignores stop strings."""
        tokens = list(prompt)
        num_prompt = len(tokens)
        while len(tokens) - num_prompt < sampling.max_tokens:
            state = root_state(adapter)
            for token_id in tokens:
                state = next_state(state, token_id)
            num_output = len(tokens) - num_prompt
            token_id = self.sample(state, sampling, num_output).token_id
            tokens.append(token_id)
            stops = (*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.eos_token_ids))
            if token_id in stops and num_output + 1 >= sampling.min_tokens:
                break
        return tokens[num_prompt:]


def _ranked(token_ids: Sequence[int], state: int, rank: int) -> int:
    return token_ids[(scramble(state) + rank) % len(token_ids)]
