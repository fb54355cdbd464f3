"""`warmgate bench structured`: what grammars cost: the sampler's time a token with and without, and compiling.

Logits are random, so that nothing but the sampler is measured; what it draws the grammars take in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from configs.grammars.guard import GrammarGuard
from configs.grammars.source import GrammarSource
from configs.schema import EngineConfig
from ops.bench.harness import BenchError, Plan, Sample, alternate
from ops.bench.report import Report
from replicas.contract import Constraint, GenerateRequest, SamplingParams, pack_tokens

BATCH = 16
METRIC = "sampler CPU µs a token"

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {"type": "object", "properties": {"city": {"type": "string"}, "zip": {"type": "string"}}},
    },
    "required": ["name", "age", "tags"],
}
GRAMMARS: dict[str, GrammarSource | None] = {
    "no grammar": None,
    "JSON object": GrammarSource(kind="json", text='{"type":"object"}'),
    "JSON schema": GrammarSource(kind="json", text=json.dumps(_PERSON)),
    "regex": GrammarSource(kind="regex", text=r"[a-z]{3,10}(\.[a-z]+)*@[a-z]+\.(com|org)"),
    "choice of 1,000": GrammarSource(kind="choice", text=json.dumps([f"choice number {i}" for i in range(1000)])),
    "GBNF": GrammarSource(kind="grammar", text='root ::= e\ne ::= t (("+" | "-") t)*\nt ::= [0-9]+ | "(" e ")"'),
}


@dataclass(slots=True)
class Sampling:
    """The sampler of a model's vocabulary with a batch of sequences of one grammar. A `harness.Side`."""

    name: str
    source: GrammarSource | None
    model_dir: Path
    num_steps: int
    _store: Any = None
    _sampler: Any = None
    _logits: Any = None

    async def start(self) -> None:
        import torch

        from replicas.engine.engine import tokenizer_json
        from replicas.engine.families import read_spec
        from replicas.engine.noise import hash_tokens
        from replicas.engine.sampler import Sampler
        from replicas.engine.structured.store import make_grammars

        torch.set_num_threads(1)
        spec = read_spec(self.model_dir)
        text = tokenizer_json(self.model_dir)
        self._store = make_grammars(EngineConfig(), text, spec.vocab_size, spec.eos_token_ids)
        if self._store is None:
            raise BenchError(f"{self.model_dir} has no tokenizer that grammars can be followed with")
        self._sampler = Sampler(hash_tokens(spec.vocab_size, torch.device("cpu")), spec.eos_token_ids)
        self._logits = torch.randn(BATCH, spec.vocab_size, generator=torch.Generator().manual_seed(1)) * 3

    async def sample(self) -> Sample:
        elapsed_s, num_tokens = 0.0, 0
        points = [await self._point(i) for i in range(BATCH)]
        for _ in range(self.num_steps):
            logits = self._logits.clone()
            began = time.thread_time()  # alone on the machine or not
            drawn = self._sampler.sample(logits, points)
            taken = [point.seq.take(token.token_id) for point, token in zip(points, drawn, strict=True)]
            elapsed_s += time.thread_time() - began
            num_tokens += len(drawn)
            if not all(taken):
                raise BenchError(f"{self.name}: a token that the grammar allowed was not taken")
            points = [await self._point(i) if _is_over(p) else p for i, p in enumerate(points)]
        return {METRIC: 1e6 * elapsed_s / num_tokens}

    async def stop(self) -> None:
        if self._store is not None:
            self._store.close()

    async def _point(self, index: int) -> Any:
        from replicas.engine.sequence import SamplePoint, Sequence

        constraint = None if self.source is None else Constraint(source=self.source)
        grammar = None if constraint is None else await self._store.get(constraint, ())
        sampling = SamplingParams(max_tokens=1000, seed=index, temperature=1.0, constraint=constraint)
        request = GenerateRequest(request_id=f"r{index}", prompt=pack_tokens([1]), sampling=sampling)
        return SamplePoint(Sequence.from_request(request, 0.0, grammar))


def _is_over(point: Any) -> bool:
    return point.seq.grammar is not None and point.seq.grammar.complete


async def run(model_dir: Path, num_steps: int, plan: Plan, notice: Any) -> Report:
    """Measures; raises BenchError when a grammar refuses what it allowed."""
    sides = [Sampling(name, source, model_dir, num_steps) for name, source in GRAMMARS.items()]
    samples = await alternate(sides, plan, notice)
    facts: dict[str, Any] = {"sequences": BATCH, "steps": num_steps, **_compiling(sides[0].model_dir)}
    ratios = [samples.ratio(METRIC, name, "no grammar") for name in GRAMMARS if name != "no grammar"]
    title = f"Grammars: the sampler's time a token, {model_dir.name}, batch {BATCH}, 1 thread"
    return Report("structured", title, samples, ratios, facts)


def _compiling(model_dir: Path) -> dict[str, float]:
    """Milliseconds by grammar: tried in the guard's process, compiled with the vocabulary; the median of some."""
    import llguidance

    from configs.grammars.translate import LIMITS
    from replicas.engine.engine import tokenizer_json
    from replicas.engine.families import read_spec
    from replicas.engine.structured.store import read_tokenizer

    spec = read_spec(model_dir)
    tokenizer = read_tokenizer(tokenizer_json(model_dir) or "", spec.vocab_size, spec.eos_token_ids)
    guard = GrammarGuard()
    found: dict[str, float] = {}
    try:
        for name, source in GRAMMARS.items():
            if source is None or tokenizer is None:
                continue
            grammar = guard.check(source)  # and the process is there
            found[f"{name}: guard ms"] = _median_ms(partial(guard.check, source))
            compile_it = partial(llguidance.LLMatcher, tokenizer, grammar, log_level=0, limits=LIMITS)
            found[f"{name}: compile ms"] = _median_ms(compile_it)
    finally:
        guard.close()
    return found


def _median_ms(work: Callable[[], object], num_times: int = 5) -> float:
    times = []
    for _ in range(num_times):
        began = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - began))
    return round(median(times), 2)
