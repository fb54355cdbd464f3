"""A contestant's end of the conversation. Standard library only: rivals run it in environments of their own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any, TextIO

Prompts = list[list[int]]


class Burst:
    """One burst of requests: which tokens came for each, and when. Seconds on any one clock."""

    def __init__(self, prompts: Prompts, max_tokens: int) -> None:
        self.prompts = prompts
        self.max_tokens = max_tokens
        self.first_s: list[float] = [0.0] * len(prompts)
        self.last_s: list[float] = [0.0] * len(prompts)
        self.tokens: Prompts = [[] for _ in prompts]

    def came(self, index: int, token_ids: Iterable[int], at_s: float) -> None:
        """Takes tokens of one request that came at `at_s` seconds after the burst's start."""
        if not self.tokens[index]:
            self.first_s[index] = at_s
        self.tokens[index].extend(token_ids)
        self.last_s[index] = at_s

    def result(self) -> dict[str, Any]:
        """Raises ValueError when a request did not get all of its tokens."""
        num_tokens = [len(token_ids) for token_ids in self.tokens]
        if num_tokens != [self.max_tokens] * len(self.prompts):
            raise ValueError(f"asked for {self.max_tokens} tokens each, got {num_tokens}")
        gaps = [
            (last - first) / max(1, self.max_tokens - 1) for first, last in zip(self.first_s, self.last_s, strict=True)
        ]
        return {
            "wall_s": max(self.last_s),
            "num_tokens": sum(num_tokens),
            "tokens": self.tokens,
            "ttft_s": self.first_s,
            "tpot_s": gaps,
        }


def claim_stdout() -> TextIO:
    """Standard output for the conversation alone: whatever a library prints there from now on goes to standard error.

    Call it before such a library is imported.
    """
    ours = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return ours


def bursts() -> Iterator[Burst]:
    """The bursts asked for, until standard input ends."""
    for line in sys.stdin:
        asked = json.loads(line)
        yield Burst(asked["prompts"], asked["max_tokens"])


async def converse(out: TextIO, about: dict[str, Any], run: Callable[[Burst], Awaitable[None]]) -> None:
    """Says ready, then runs every burst that is asked for."""
    print(json.dumps({"ready": True, "about": about}), file=out)
    for burst in bursts():
        await run(burst)
        print(json.dumps(burst.result()), file=out)
