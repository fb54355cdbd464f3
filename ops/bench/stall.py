"""`warmgate bench stall`: how long running answers wait for their next token while a long prompt is computed.

talkers   ── tokens alone ──│── tokens while the prompt is computed, chunk by chunk ──│   one that ends is followed by
reader                      │── 8,000 tokens ─────────────────────────────────────────│   another at once

A gap is the time between two tokens of one answer; TPOT is the mean of an answer's gaps, as vLLM's benchmark has it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from configs.schema import EngineConfig
from ops.bench.harness import BenchError, Goal, Notice, Plan, Ratio, Sample, Samples, alternate
from ops.bench.report import Report
from replicas.contract import GenerateRequest, SamplingParams, pack_tokens

if TYPE_CHECKING:
    from replicas.engine.core import EngineCore

UNLIMITED = "no limit"

GAPS, TPOTS = "gap p99 over p50", "TPOT p99 over p50"
GOALS = {GAPS: Goal.at_most(2.0), TPOTS: Goal.at_most(2.0)}


@dataclass(frozen=True, slots=True)
class Size:
    """`limit_s`: of the side with a limit (`engine.max_prefill_stall_s`). `answer_tokens`: of each
    talker, few enough that whole answers fit beside the prompt; `num_alone`: gaps of each before it comes."""

    num_talkers: int = 4
    talker_tokens: int = 24
    answer_tokens: int = 12
    num_alone: int = 10
    prompt_tokens: int = 8_000
    limit_s: float = 0.03


@dataclass(slots=True)
class Stalling:
    """One limit. A `harness.Side`."""

    name: str
    model_dir: Path
    size: Size
    limit_s: float | None
    _built: list[EngineCore] = field(default_factory=list)
    _num_visits: int = 0

    async def start(self) -> None:
        from replicas.engine.engine import build_engine

        config = EngineConfig(
            kv_cache_gib=1.0, self_check=False, dtype="float32", prefix_caching=False, max_prefill_stall_s=self.limit_s
        )
        self._built.append(build_engine(self.model_dir, config, "bench", time.monotonic).core)

    async def sample(self) -> Sample:
        self._num_visits += 1
        talk = _Talk(self._built[0], self.size, Random(self._num_visits))
        return talk.sample()

    async def stop(self) -> None:
        self._built.clear()


class _Talk:
    """One visit. Gaps count that end while the prompt is computed, and answers that lie within that time."""

    def __init__(self, core: EngineCore, size: Size, draw: Random) -> None:
        self._core = core
        self._size = size
        self._draw = draw
        self._num_asked = 0
        self._times: dict[str, list[float]] = {}
        self._over: list[list[float]] = []

    def sample(self) -> Sample:
        """Talks alone, then beside the prompt. Milliseconds, but for ratios and rates."""
        size = self._size
        for _ in range(size.num_talkers):
            self._ask()
        while len(alone := self._gaps_since(0.0)) < size.num_talkers * size.num_alone:
            self._step()
        self._over.clear()
        began = time.perf_counter()
        self._core.add(self._request("reader", size.prompt_tokens, 1))
        num_steps = 0
        while "reader" not in self._step():
            num_steps += 1
        took_s = time.perf_counter() - began
        gaps = self._gaps_since(began)
        within = [times for times in self._over if times[0] >= began and len(times) > 1]
        tpots = [(times[-1] - times[0]) / (len(times) - 1) for times in within]
        if not tpots:
            raise BenchError(
                f"no answer of {size.answer_tokens} tokens began and ended beside {size.prompt_tokens} tokens"
            )
        for request_id in self._times:
            self._core.abort(request_id)
        while self._core.has_work:
            self._core.step()
        gap, tpot = _Percentiles.of(gaps), _Percentiles.of(tpots)
        return {
            "gap alone ms p50": 1e3 * statistics.median(alone),
            "gap ms p50": 1e3 * gap.p50,
            "gap ms p99": 1e3 * gap.p99,
            GAPS: gap.p99 / gap.p50,
            "gap p99 over alone p50": gap.p99 / statistics.median(alone),
            "TPOT ms p50": 1e3 * tpot.p50,
            "TPOT ms p99": 1e3 * tpot.p99,
            TPOTS: tpot.p99 / tpot.p50,
            "prompt tok/s": size.prompt_tokens / took_s,
            "tokens a chunk": size.prompt_tokens / (num_steps + 1),
        }

    def _ask(self) -> None:
        request_id = f"talker {self._num_asked}"
        self._num_asked += 1
        self._times[request_id] = []
        self._core.add(self._request(request_id, self._size.talker_tokens, self._size.answer_tokens))

    def _request(self, request_id: str, num_tokens: int, max_tokens: int) -> GenerateRequest:
        prompt = pack_tokens([self._draw.randrange(1000, 40_000) for _ in range(num_tokens)])
        sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True)
        return GenerateRequest(request_id=request_id, prompt=prompt, sampling=sampling)

    def _step(self) -> set[str]:
        """One step; who ended with it. An answer that ends is followed by another."""
        ended = set()
        for delta in self._core.step():
            if delta.fault is not None:
                raise BenchError(f"request {delta.request_id} failed: {delta.fault.message}")
            if delta.token_ids and delta.request_id in self._times:
                self._times[delta.request_id].append(time.perf_counter())
            if delta.finish_reason is not None:
                ended.add(delta.request_id)
        for request_id in ended & self._times.keys():
            self._over.append(self._times.pop(request_id))
            self._ask()
        return ended

    def _gaps_since(self, began: float) -> list[float]:
        """Those that ended after then."""
        answers = (*self._over, *self._times.values())
        return [b - a for times in answers for a, b in pairwise(times) if b >= began]


@dataclass(frozen=True, slots=True)
class _Percentiles:
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> _Percentiles:
        ranked = sorted(values)
        return cls(statistics.median(ranked), ranked[round(0.99 * (len(ranked) - 1))])


async def run(model_dir: Path, size: Size, plan: Plan, notice: Notice) -> Report:
    """Measures both sides in turn."""
    limited = f"limit {1e3 * size.limit_s:g} ms"
    sides = [Stalling(limited, model_dir, size, size.limit_s), Stalling(UNLIMITED, model_dir, size, None)]
    samples = await alternate(sides, plan, notice)
    ratios = [_absolute(samples, limited, metric, goal) for metric, goal in GOALS.items()]
    ratios.append(samples.ratio("gap ms p99", limited, UNLIMITED))
    ratios.append(samples.ratio("prompt tok/s", limited, UNLIMITED))
    facts = {
        "answers at once": size.num_talkers,
        "prompt tokens": size.prompt_tokens,
        "tokens an answer": size.answer_tokens,
    }
    title = f"Running answers beside a prompt of {size.prompt_tokens:,} tokens: {model_dir.name}, float32, 1 thread"
    return Report("stall", title, samples, ratios, facts)


def _absolute(samples: Samples, side: str, metric: str, goal: Goal) -> Ratio:
    return Ratio(metric, side, "1", samples.spread(side, metric), goal)
