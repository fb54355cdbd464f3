"""What is asked of the replicas, and when an answer came in time."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from ops.bench.load_spec import Timing, words

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Prompts of `input_tokens`, the first `shared_tokens` alike in all, answers of exactly `output_tokens`.

    `rates`: requests a second to try; none: they are looked for (`ops.tune.capacity`).
    """

    input_tokens: int = 512
    shared_tokens: int = 128
    output_tokens: int = 64
    num_requests: int = 64
    rates: tuple[float, ...] = ()

    def prompts(self, tokenizer: tokenizers.Tokenizer, run: str) -> tuple[tuple[int, ...], ...]:
        """Token ids of every prompt: made-up words, cut to the token. What is not shared is `run`'s alone, so that no
        run finds another's prompts in the prefix cache; every candidate gets the same."""
        shared = _ids(tokenizer, Random("shared"), self.shared_tokens)
        rng = Random(run)
        own = self.input_tokens - self.shared_tokens
        return tuple(shared + _ids(tokenizer, rng, own) for _ in range(self.num_requests))

    def as_json(self) -> dict[str, Any]:
        """What decides the figures: not the rates, which are noted with each run."""
        return {
            "input_tokens": self.input_tokens,
            "shared_tokens": self.shared_tokens,
            "output_tokens": self.output_tokens,
            "requests": self.num_requests,
        }

    def __str__(self) -> str:
        return (
            f"{self.num_requests} requests of {self.input_tokens} tokens in ({self.shared_tokens} shared), "
            f"{self.output_tokens} out"
        )


def _ids(tokenizer: tokenizers.Tokenizer, rng: Random, num_tokens: int) -> tuple[int, ...]:
    """A word is a token at least."""
    ids = tokenizer.encode(words(rng, num_tokens), add_special_tokens=False).ids if num_tokens else []
    assert len(ids) >= num_tokens, f"{len(ids)=} {num_tokens=}"
    return tuple(ids[:num_tokens])


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """In time: first token within `ttft_s` of when the request was meant to be sent, and `tpot_s` a token after it on
    average. A rate is met when at least `share` of its requests came in time."""

    ttft_s: float = 1.0
    tpot_s: float = 0.1
    share: float = 0.95

    def in_time(self, timing: Timing | None) -> bool:
        """None: no right answer came."""
        return timing is not None and timing.ttft_s <= self.ttft_s and timing.tpot_s <= self.tpot_s

    def as_json(self) -> dict[str, float]:
        return {"ttft_ms": 1000 * self.ttft_s, "tpot_ms": 1000 * self.tpot_s, "share": self.share}

    def __str__(self) -> str:
        return f"TTFT ≤ {1000 * self.ttft_s:g} ms and TPOT ≤ {1000 * self.tpot_s:g} ms for {self.share:.0%} of requests"
