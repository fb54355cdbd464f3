"""What to send, what must come back, and what a load run reports: the words between a benchmark and its generator."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import msgspec

_SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "ri", "so", "tu", "ve", "za")


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """As many requests under way as `concurrency`: the next leaves when one has ended."""

    concurrency: int


class Open(msgspec.Struct, frozen=True, tag="open"):
    """Arrivals that wait for nobody, at `rate_per_s`; gaps are exponential (`poisson`) or all alike (`even`)."""

    rate_per_s: float
    spacing: Literal["poisson", "even"] = "poisson"

    def times(self, num_requests: int, rng: random.Random) -> list[float]:
        """When each request is meant to leave, seconds after the start."""
        at, times = 0.0, []
        for _ in range(num_requests):
            times.append(at)
            at += rng.expovariate(self.rate_per_s) if self.spacing == "poisson" else 1.0 / self.rate_per_s
        return times


Arrivals: TypeAlias = Closed | Open


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One load run of streamed requests. Prompts are drawn from `seed`: `num_shared_words` are the same in all,
    `num_words` differ; `prompts` are token ids instead of them, one a request, for `/v1/completions`. Each answer must
    have `num_tokens` tokens, one finish reason and `[DONE]`."""

    host: str
    port: int
    model: str
    arrivals: Arrivals
    num_requests: int
    num_tokens: int
    route: Literal["/v1/chat/completions", "/v1/completions"] = "/v1/chat/completions"
    headers: dict[str, str] = {}
    extra: dict[str, Any] = {}
    prompts: tuple[tuple[int, ...], ...] = ()
    num_words: int = 48
    num_shared_words: int = 16
    seed: int = 0
    timeout_s: float = 60.0

    def bodies(self) -> list[bytes]:
        """The request bodies, in the order sent."""
        rng = random.Random(self.seed)
        shared = words(random.Random("shared"), self.num_shared_words)
        bodies = []
        for i in range(self.num_requests):
            content: Any = self.prompts[i] if self.prompts else f"{shared} {words(rng, self.num_words)}"
            chat = self.route == "/v1/chat/completions"
            prompt: dict[str, Any] = {"prompt": content}
            if chat:
                prompt = {"messages": [{"role": "user", "content": content}]}
            fixed = {"model": self.model, "max_tokens": self.num_tokens, "stream": True, "temperature": 0}
            body = prompt | fixed | {"stream_options": {"include_usage": True}} | self.extra
            bodies.append(msgspec.json.encode(body))
        return bodies


def words(rng: random.Random, count: int) -> str:
    """`count` made-up words."""
    return " ".join("".join(rng.choices(_SYLLABLES, k=rng.randint(1, 3))) for _ in range(count))


class Quantiles(msgspec.Struct, frozen=True):
    """Of times in seconds; None where the quantile falls on a request that was never answered, or of nothing."""

    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Quantiles:
        """Nearest-rank quantiles; `math.inf` stands for a request that was never answered."""
        if not values:
            return cls(None, None, None, None)
        ranked = [value if math.isfinite(value) else None for value in sorted(values)]
        p50, p90, p99 = (ranked[max(0, math.ceil(q * len(ranked)) - 1)] for q in (0.5, 0.9, 0.99))
        return cls(p50, p90, p99, ranked[-1])


class Timing(msgspec.Struct, frozen=True, array_like=True):
    """A right answer: seconds from the intended send time to its first token, then a token on average."""

    ttft_s: float
    tpot_s: float


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a run. `num_events` counts SSE events with choices; `num_tokens` is what usage said.

    `ttft` and `latency` count from the intended send time, and every request that was refused or failed counts as
    one that never ends. `gap` is the time between pieces of one stream as they arrived. `timings`: of every request in
    the order sent, None without a right answer.
    """

    num_requests: int
    num_ok: int
    num_rejected: int
    num_failed: int
    num_events: int
    num_tokens: int
    wall_s: float
    ttft: Quantiles
    latency: Quantiles
    gap: Quantiles
    faults: tuple[str, ...] = ()
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    timings: tuple[Timing | None, ...] = ()


class AnswerError(Exception):
    """A streamed answer is not what was asked for."""


class Answer(msgspec.Struct, frozen=True):
    """A streamed answer that was read to its end. `first_end`: offset just past its first event with text.

    `num_prompt` and `num_cached` are what usage says of the prompt's tokens, 0 where it says nothing.
    """

    num_events: int
    num_tokens: int
    first_end: int
    num_prompt: int = 0
    num_cached: int = 0


class _Choice(msgspec.Struct):
    delta: dict[str, Any] = {}
    text: str | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens: int = 0
    prompt_tokens_details: _Details | None = None

    @property
    def num_cached(self) -> int:
        return (self.prompt_tokens_details.cached_tokens or 0) if self.prompt_tokens_details else 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_EVENTS = msgspec.json.Decoder(_Event)


def read_answer(body: bytes, num_tokens: int) -> Answer:
    """Checks a whole SSE body of one choice. Raises AnswerError for a missing `[DONE]`, an error event, no or more
    than one finish reason, or usage that is not `num_tokens`."""
    *events, rest = body.split(b"\n\n")
    if rest or not events or events[-1] != b"data: [DONE]":
        raise AnswerError(f"the stream ends in {body[-60:]!r}, not in [DONE]")
    num_events, offset, first_end, reasons = 0, 0, None, []
    usage: _Usage | None = None
    for raw in events[:-1]:
        offset += len(raw) + 2
        event = _EVENTS.decode(raw.removeprefix(b"data: "))
        if event.error is not None:
            raise AnswerError(f"error event: {event.error}")
        usage = event.usage or usage
        for choice in event.choices:
            num_events += 1
            reasons += [choice.finish_reason] if choice.finish_reason else []
            if first_end is None and (choice.text or choice.delta.get("content") or choice.finish_reason):
                first_end = offset
    if len(reasons) != 1 or first_end is None:
        raise AnswerError(f"finish reasons {reasons} instead of exactly one")
    if usage is None or usage.completion_tokens != num_tokens:
        raise AnswerError(f"{usage and usage.completion_tokens} tokens in usage, asked for {num_tokens}")
    return Answer(num_events, num_tokens, first_end, usage.prompt_tokens, usage.num_cached)
