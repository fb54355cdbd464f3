"""`warmgate bench kv`: one more token with and without the KV cache, at growing lengths.

Without a cache every token computes the whole text again, which is what the cache saves; the tokens must be the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from configs.schema import EngineConfig
from ops.bench.harness import BenchError, Goal, Notice, Plan, Ratio, Sample, Samples, alternate
from ops.bench.report import Report
from replicas.contract import GenerateRequest, SamplingParams, pack_tokens

LENGTHS = (64, 128, 256, 512, 1024)
NUM_TOKENS = 4


@dataclass(slots=True)
class Decoding:
    """One way to decode. `start(seq)` says from which position a step computes. A `harness.Side`."""

    name: str
    uses_cache: bool
    model_dir: Path
    lengths: Sequence[int]
    tokens: dict[int, list[int]] = field(default_factory=dict)
    _runner: object = None

    async def start(self) -> None:
        from replicas.engine.engine import build_engine

        config = EngineConfig(kv_cache_gib=0.25, self_check=False, dtype="float32")
        self._runner = build_engine(self.model_dir, config, "bench", time.monotonic).core.runner

    async def sample(self) -> Sample:
        return {f"ms a token at {length}": self._decode(length) for length in self.lengths}

    async def stop(self) -> None:
        self._runner = None

    def _decode(self, length: int) -> float:
        from replicas.engine.core import Runner
        from replicas.engine.sequence import Plan as StepPlan
        from replicas.engine.sequence import PlanItem, Sequence

        runner: Runner = self._runner  # type: ignore[assignment]
        rng = Random(length)
        prompt = pack_tokens([rng.randrange(1000, 40000) for _ in range(length)])
        sampling = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0, ignore_eos=True)
        seq = Sequence.from_request(GenerateRequest(request_id="kv", prompt=prompt, sampling=sampling), 0.0)
        seq.block_ids = list(range(-(-(length + NUM_TOKENS + 1) // 16)))
        first = runner.execute(StepPlan((PlanItem(seq, 0, length, True),)))
        seq.tokens.append(first.sampled[0][0].token_id)
        began = time.perf_counter()
        for _ in range(NUM_TOKENS):
            start = len(seq.tokens) - 1 if self.uses_cache else 0
            result = runner.execute(StepPlan((PlanItem(seq, start, len(seq.tokens) - start, True),)))
            seq.tokens.append(result.sampled[0][0].token_id)
        elapsed_s = time.perf_counter() - began
        self.tokens[length] = list(seq.tokens[length:])
        return 1000 * elapsed_s / NUM_TOKENS


async def run(model_dir: Path, lengths: Sequence[int], plan: Plan, notice: Notice) -> Report:
    """Measures; raises BenchError when the two ways disagree about a token."""
    cached, naive = Decoding("cache", True, model_dir, lengths), Decoding("no cache", False, model_dir, lengths)
    samples = await alternate([cached, naive], plan, notice)
    if cached.tokens != naive.tokens:
        raise BenchError(f"with cache {cached.tokens}, without {naive.tokens}")
    facts = {"tokens compared": sum(len(t) for t in cached.tokens.values()), "identical": True}
    title = "KV cache: one more token, SmolLM2-135M, float32, 1 thread"
    return Report("kv", title, samples, _ratios(samples, lengths), facts)


def _ratios(samples: Samples, lengths: Sequence[int]) -> list[Ratio]:
    goals = {1024: Goal.at_least(10.0)}
    return [samples.ratio(f"ms a token at {n}", "no cache", "cache", goals.get(n)) for n in lengths]
