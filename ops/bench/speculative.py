"""`warmgate bench speculative`: decoding with guesses beside decoding without, on work that suits them and work that
does not.

Only decoding is timed, from the moment on when every prompt is computed. Every side gives the same tokens, or the
measurement is void. Lengths adapt, as in use; `Table` holds them fixed and compares with what theory expects.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from configs.schema import EngineConfig, SpeculativeConfig
from ops.bench.harness import BenchError, Goal, Notice, Plan, Ratio, Sample, Samples, alternate
from ops.bench.report import Report
from replicas.contract import GenerateRequest, SamplingParams, pack_tokens

if TYPE_CHECKING:
    from replicas.engine.core import EngineCore

PLAIN = "plain"

PASSAGES = (
    "A prefix cache keeps the keys and values of prompts that were computed before. When the next prompt begins with "
    "the same tokens, its first blocks are found and only the rest is computed. Blocks that nobody holds are evicted "
    "last used first, tails before heads, so that a chain is never broken in the middle.",
    "The harbour office opens at seven. Ships longer than ninety metres wait for the pilot at the outer buoy; shorter "
    "ones may enter on their own between sunrise and sunset. Fresh water is sold at pier four, diesel at pier nine, "
    "and the customs house is the red building behind the fish market.",
)
QUESTIONS = (
    "Explain how rain forms.",
    "Write a short story about a fox who learns to swim.",
    "What should I look at before I buy a used bicycle?",
    "Describe the city of your dreams.",
    "Why do people sleep?",
    "Give me five ideas for a birthday party.",
    "How does a refrigerator work?",
    "Tell me about the history of paper.",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that run at once, and how they are sampled. `copies`: the answers repeat their prompts, so that prompt
    lookup has to pay. Prompts are chat messages, unless they copy: then plain text."""

    name: str
    prompts: Sequence[str]
    num_tokens: int
    temperature: float = 0.0
    copies: bool = False


METHODS = ("ngram", "lookahead", "mlp_speculator", "draft_model")


def sides(model_dir: Path, files: Mapping[str, Path], wanted: Sequence[str], num_tokens: int) -> list[Speaking]:
    """Plain decoding and the methods wanted. `files`: what `warmgate train-draft` made, for those that need it."""
    work = workloads(num_tokens)
    made = [Speaking(PLAIN, model_dir, work)]
    for method in wanted:
        model = str(files[method]) if method in files else None
        config = msgspec.convert({"method": method, "model": model}, SpeculativeConfig)
        made.append(Speaking(method, model_dir, work, config))
    return made


def workloads(num_tokens: int) -> tuple[Workload, ...]:
    """Copying and talking, alone and eight at once, and noise that nobody can guess."""
    copying = [f"Text:\n{passage}\n\nCopy 1:\n{passage}\n\nCopy 2:\n" for passage in PASSAGES]
    return (
        Workload("copying, 1", copying[:1], num_tokens, copies=True),
        Workload("copying, 2", copying, num_tokens, copies=True),
        Workload("chat, 1", QUESTIONS[:1], num_tokens),
        Workload("chat sampled, 1", QUESTIONS[1:2], num_tokens, 0.8),
        Workload("chat, 8", QUESTIONS, num_tokens // 2),
        Workload("noise, 1", QUESTIONS[2:3], num_tokens, 2.0),
    )


@dataclass(slots=True)
class Speaking:
    """One way to decode. A `harness.Side`."""

    name: str
    model_dir: Path
    work: Sequence[Workload]
    speculative: SpeculativeConfig | None = None
    said: dict[str, list[list[int]]] = field(default_factory=dict)
    _built: list[EngineCore] = field(default_factory=list)

    @property
    def core(self) -> EngineCore:
        """The engine, between `start` and `stop`."""
        return self._built[0]

    async def start(self) -> None:
        from replicas.engine.engine import build_engine

        config = EngineConfig(
            kv_cache_gib=0.5, self_check=False, dtype="float32", max_num_seqs=16, speculative=self.speculative
        )
        self._built.append(build_engine(self.model_dir, config, "bench", time.monotonic).core)

    async def sample(self) -> Sample:
        return {f"tok/s {work.name}": self.speak(work).tokens_per_s for work in self.work}

    async def stop(self) -> None:
        self._built.clear()

    def speak(self, work: Workload) -> Spoken:
        """Runs a workload once."""
        core, before = self.core, self.core.stats()
        said = {request.request_id: list[int]() for request in _requests(self.model_dir, work)}
        for request in _requests(self.model_dir, work):
            core.add(request)
        while not all(said.values()):
            _take(core, said)
        num_before, num_steps, began = sum(map(len, said.values())), 0, time.perf_counter()
        while core.has_work:
            _take(core, said)
            num_steps += 1
        seconds = time.perf_counter() - began
        self.said[work.name] = list(said.values())
        after = core.stats()
        padded = before.num_accepted_by_position + (0,) * len(after.num_accepted_by_position)
        return Spoken(
            num_tokens=sum(map(len, said.values())) - num_before,
            num_steps=num_steps,
            seconds=seconds,
            num_drafts=after.num_drafts - before.num_drafts,
            by_position=tuple(b - a for a, b in zip(padded, after.num_accepted_by_position, strict=False)),
        )


@dataclass(frozen=True, slots=True)
class Spoken:
    """What one run of a workload took, from when all its prompts were computed. `by_position[i]`: guesses i + 1 tokens
    ahead that came true."""

    num_tokens: int
    num_steps: int
    seconds: float
    num_drafts: int
    by_position: tuple[int, ...]

    @property
    def step_s(self) -> float:
        return self.seconds / self.num_steps

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def _take(core: EngineCore, said: Mapping[str, list[int]]) -> None:
    for delta in core.step():
        if delta.fault is not None:
            raise BenchError(f"request {delta.request_id} failed: {delta.fault.message}")
        said[delta.request_id].extend(delta.token_ids)


def _requests(model_dir: Path, work: Workload) -> Iterator[GenerateRequest]:
    for i, prompt in enumerate(_prompts(model_dir, work)):
        sampling = SamplingParams(max_tokens=work.num_tokens, seed=i, temperature=work.temperature, ignore_eos=True)
        yield GenerateRequest(request_id=f"{work.name} {i}", prompt=pack_tokens(prompt), sampling=sampling)


def _prompts(model_dir: Path, work: Workload) -> list[list[int]]:
    from configs.tokenizer import load_model_files
    from gateway.template import ChatTemplate

    files = load_model_files(str(model_dir), model_dir)
    texts = list(work.prompts)
    if files.chat_template is not None and not work.copies:
        template = ChatTemplate(files.chat_template, {}, time.time)
        chats: list[list[dict[str, Any]]] = [[{"role": "user", "content": text}] for text in texts]
        texts = [template.render(chat, {}, generation_prompt=True) for chat in chats]
    return [files.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


async def run(sides: Sequence[Speaking], plan: Plan, notice: Notice) -> Report:
    """Measures. The first side is the plain one; raises BenchError when another gives other tokens."""
    plain, *guessing = sides
    samples = await alternate(sides, plan, notice)
    for side in guessing:
        if side.said != plain.said:
            raise BenchError(f"{side.name} says other tokens than plain decoding: {_difference(plain.said, side.said)}")
    ratios = [ratio for side in guessing for ratio in _ratios(samples, side)]
    facts = {"tokens": {work.name: work.num_tokens * len(work.prompts) for work in plain.work}}
    title = f"Speculative decoding: {plain.model_dir.name}, float32, 1 thread"
    return Report("speculative", title, samples, ratios, facts)


def _difference(said: Mapping[str, list[list[int]]], other: Mapping[str, list[list[int]]]) -> str:
    """Where they part first, workload by workload."""
    places = []
    for name, answers in said.items():
        for ours, theirs in zip(answers, other[name], strict=True):
            parted = [i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]]
            places += [f"{name} after {parted[0]} tokens"] if parted else []
    return ", ".join(places)


def _ratios(samples: Samples, side: Speaking) -> list[Ratio]:
    return [samples.ratio(f"tok/s {work.name}", side.name, PLAIN, _goal(side, work)) for work in side.work]


def _goal(side: Speaking, work: Workload) -> Goal:
    pays = work.copies and side.speculative is not None and side.speculative.method == "ngram"
    return Goal.at_least(1.8 if pays else 0.97)
