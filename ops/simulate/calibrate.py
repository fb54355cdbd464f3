"""Measures what a step of a live replica costs, with a few streamed requests and nothing but the OpenAI API.

    prefill   two lengths of prompt that nobody has cached: the difference in TTFT over the difference in tokens
    decode    one answer alone, then several at once: their time per token on a line over their number; where a
              gateway tells which replica answered, over their number at that replica
    overhead  what the short prompts took beyond the steps so found

The shortest of several TTFTs counts, and the median gap between tokens: what disturbs only ever adds. The overhead is a
median: part of it is the usual disturbance.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

import httpx

from ops.simulate.calibration import Calibration
from ops.simulate.errors import SimulationError

MIN_GAPS = 8
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Measuring:
    """What to ask. `prompt_tokens`: length of the long prompt (the short: a quarter). `sequences`: answers at once.

    `max_num_batched_tokens`: prompt tokens the server computes in one step; each such step has the base time in it.
    """

    model: str
    api_key: str | None = None
    prompt_tokens: int = 2048
    sequences: int = 8
    max_num_batched_tokens: int = 2048
    num_output: int = 64
    repeats: int = 5
    seed: int = 0

    def num_steps(self, answer: Answer) -> int:
        """Steps that its prompt takes alone."""
        return -(-answer.num_uncached // self.max_num_batched_tokens)


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer: prompt tokens that had to be computed, seconds to the first token, gaps between tokens.

    `replica`: who gave it, where that is told.
    """

    num_uncached: int
    ttft_s: float
    gaps_s: tuple[float, ...]
    replica: str = ""


async def calibrate_live(url: str, measuring: Measuring, clock: Callable[[], float] = time.perf_counter) -> Calibration:
    """Asks the server and fits. Raises SimulationError when it does not answer, or answers make no sense."""
    headers = {} if measuring.api_key is None else {"Authorization": f"Bearer {measuring.api_key}"}
    base = url.rstrip("/").removesuffix("/v1")
    try:
        async with httpx.AsyncClient(base_url=base, headers=headers, timeout=TIMEOUT_S) as client:
            return await _measure(_Asker(client, measuring, clock))
    except httpx.HTTPError as error:
        raise SimulationError(f"{url}: {error or type(error).__name__}") from error


async def _measure(asker: _Asker) -> Calibration:
    measuring = asker.measuring
    probe = await asker.ask(num_words=32, num_output=1)  # also warms the way
    words_per_token = 32 / max(1, probe.num_uncached)
    prompts: list[list[Answer]] = []
    for num_tokens in (measuring.prompt_tokens // 4, measuring.prompt_tokens):
        num_words = max(1, int(num_tokens * words_per_token))
        prompts.append([await asker.ask(num_words, 1) for _ in range(measuring.repeats)])
    alone = await asker.ask(4, measuring.num_output)
    together = await asyncio.gather(*(asker.ask(4, measuring.num_output) for _ in range(measuring.sequences)))
    return fit(measuring, prompts, (alone, together))


def fit(
    measuring: Measuring, prompts: Sequence[Sequence[Answer]], decodes: tuple[Answer, Sequence[Answer]]
) -> Calibration:
    """Step costs from short and long prompts (answers each), and from one answer alone and several together.

    Raises SimulationError when there is too little, or the long prompts were no slower.
    """
    alone, together = decodes
    fewest = min(len(answer.gaps_s) for answer in (alone, *together))
    if fewest < MIN_GAPS:
        raise SimulationError(f"an answer had {fewest + 1} tokens; {MIN_GAPS + 1} are needed to time them")
    base_s, per_sequence_s = _step_costs(alone, together)
    step_s = base_s + per_sequence_s
    short, long = (min(answers, key=lambda a: a.ttft_s) for answers in prompts)
    num_more = long.num_uncached - short.num_uncached
    more_steps = measuring.num_steps(long) - measuring.num_steps(short)
    token_s = (long.ttft_s - short.ttft_s - more_steps * step_s) / num_more if num_more > 0 else 0.0
    if token_s <= 0:
        raise SimulationError(
            f"a prompt of {long.num_uncached} tokens took {long.ttft_s:.3f} s, one of {short.num_uncached} "
            f"{short.ttft_s:.3f} s: no prefill rate can be told; try longer ones with --prompt-tokens"
        )
    beyond = [a.ttft_s - measuring.num_steps(a) * step_s - a.num_uncached * token_s for a in prompts[0]]
    return Calibration(
        prefill_tokens_per_s=1 / token_s,
        step_base_s=base_s,
        step_per_sequence_s=per_sequence_s,
        overhead_s=max(0.0, statistics.median(beyond)),
        source=f"measured: {measuring.model}",
    )


def _step_costs(alone: Answer, together: Sequence[Answer]) -> tuple[float, float]:
    """(seconds of a step, more for each sequence in it): the line through one alone that fits the others best."""
    alone_s = statistics.median(alone.gaps_s)
    numbers = Counter(answer.replica for answer in together)
    points = [(numbers[answer.replica] - 1, statistics.median(answer.gaps_s) - alone_s) for answer in together]
    weight = sum(more**2 for more, _ in points)
    per_sequence_s = max(0.0, sum(more * slower_s for more, slower_s in points) / weight) if weight else 0.0
    return max(alone_s - per_sequence_s, 1e-6), per_sequence_s


class _Asker:
    """Streams completions of prompts that no cache knows."""

    def __init__(self, client: httpx.AsyncClient, measuring: Measuring, clock: Callable[[], float]) -> None:
        self.measuring = measuring
        self._client = client
        self._clock = clock
        self._random = Random(f"{measuring.seed}/{time.time_ns()}")

    async def ask(self, num_words: int, num_output: int) -> Answer:
        """One streamed answer. Raises SimulationError for an error status, httpx.HTTPError for none."""
        body = {
            "model": self.measuring.model,
            "prompt": " ".join(str(self._random.randrange(100, 1000)) for _ in range(num_words)),
            "max_tokens": num_output,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        replica = ""
        sent_at = self._clock()
        arrivals: list[float] = []
        usage: dict[str, int] = {}
        async with self._client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode(errors="replace")[:300]
                raise SimulationError(f"{answer.request.url}: {answer.status_code} {text}")
            replica = answer.headers.get("x-warmgate-replica", "")
            async for line in answer.aiter_lines():
                event = _event(line)
                if event.get("usage"):
                    details = event["usage"].get("prompt_tokens_details") or {}
                    usage = {"all": event["usage"]["prompt_tokens"], "cached": details.get("cached_tokens") or 0}
                if event.get("choices"):
                    arrivals.append(self._clock())
        if not arrivals or not usage:
            raise SimulationError(f"{answer.request.url}: the stream had no tokens or no usage in it")
        gaps = tuple(after - before for before, after in pairwise(arrivals))
        return Answer(usage["all"] - usage["cached"], arrivals[0] - sent_at, gaps, replica)


def _event(line: str) -> dict[str, Any]:
    """The JSON of one line of server-sent events; empty for lines without."""
    if not line.startswith("data:") or line.endswith("[DONE]"):
        return {}
    try:
        found = json.loads(line.removeprefix("data:"))
    except ValueError as error:
        raise SimulationError(f"no JSON in the stream: {line[:100]!r}") from error
    return found if isinstance(found, dict) else {}
