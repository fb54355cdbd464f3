"""`warmgate bench lora`: batches in which every sequence has its own adapter, beside the base model; the pause that a
swap makes; and a fleet with 1,000 adapters (`lora_fleet`).

One engine serves all sides of a batch: what differs is which adapters its rows name.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from configs.schema import EngineConfig
from ops.bench.harness import Goal, Notice, Plan, Ratio, Sample, Samples, alternate
from ops.bench.lora_files import write_random
from ops.bench.lora_fleet import Fleet, FleetWorkload, measure
from ops.bench.report import Report
from replicas.contract import AdapterSpec, GenerateRequest, SamplingParams, pack_tokens

if TYPE_CHECKING:
    from replicas.engine.core import EngineCore
    from replicas.engine.sequence import PlanItem

BASE, MIXED = "base model", "ranks 4 to 128"
CONTEXT, BLOCK = 64, 16


@dataclass(frozen=True, slots=True)
class Workload:
    """`levels`: sequences in a batch, and adapters of `rank` that they share; `num_mixed` sequences with an adapter
    each, of `ranks` in turn."""

    model_dir: Path
    levels: tuple[int, ...] = (1, 8, 64, 256)
    rank: int = 8
    num_mixed: int = 64
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    num_steps: int = 4
    num_swaps: int = 20
    dtype: Literal["float32", "bfloat16"] = "float32"
    fleet: FleetWorkload = field(default_factory=FleetWorkload)

    @property
    def mixed(self) -> list[int]:
        """The rank of each adapter of the mixed batch."""
        return [self.ranks[i % len(self.ranks)] for i in range(self.num_mixed)]

    def batches_with(self, num_adapters: int) -> list[int]:
        """Batches of as many sequences and more; and one of `num_mixed`, which more adapters have in turn."""
        return sorted({n for n in self.levels if n >= num_adapters or n == self.num_mixed})


@dataclass(frozen=True, slots=True)
class World:
    """One engine with every adapter loaded but `spare`."""

    core: EngineCore
    spare: AdapterSpec
    vocab_size: int

    @classmethod
    @contextmanager
    def of(cls, workload: Workload) -> Iterator[World]:
        from replicas.engine.engine import build_engine
        from replicas.engine.families import read_spec

        spec = read_spec(workload.model_dir)
        core = build_engine(workload.model_dir, _config(workload), "bench", time.monotonic).core
        with tempfile.TemporaryDirectory(prefix="wgb-lora-") as folder:
            for rank in {workload.rank, *workload.ranks}:
                write_random(Path(folder) / str(rank), spec, rank)

            def described(name: str, rank: int) -> AdapterSpec:
                return AdapterSpec(adapter_id=name, path=f"{folder}/{rank}", rank=rank)

            for i in range(max(workload.levels)):
                core.load_adapter(described(f"own-{i}", workload.rank))
            for i, rank in enumerate(workload.mixed):
                core.load_adapter(described(f"mixed-{i}", rank))
            yield cls(core, described("spare", workload.rank), spec.vocab_size)


def _config(workload: Workload) -> EngineConfig:
    from replicas.engine.families import read_spec
    from replicas.engine.lora.layout import shapes_of
    from replicas.engine.lora.pool import page_bytes
    from replicas.engine.lora.setup import DTYPES

    spec, most = read_spec(workload.model_dir), max(workload.levels)
    num_seqs = max(most, workload.num_mixed)
    num_ranks = (most + 1) * workload.rank + sum(workload.mixed) + max(workload.ranks)
    size = page_bytes(shapes_of(spec), spec.num_layers, DTYPES[workload.dtype])
    return EngineConfig(
        dtype=workload.dtype,
        self_check=False,
        kv_cache_gib=4.0,
        max_model_len=CONTEXT,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(512, num_seqs),
        max_adapters=most + workload.num_mixed + 1,
        max_lora_rank=max(workload.rank, *workload.ranks),
        lora_pool_gib=(num_ranks + 2) * size / 2**30,
    )


@dataclass(frozen=True, slots=True)
class Batches:
    """Decode steps of whole batches of `levels` sequences. Sequence i has adapter i of `adapters`, which go round; when
    they are more than sequences, every step has the next ones. A `harness.Side`."""

    name: str
    world: World
    levels: Sequence[int]
    adapters: Sequence[str | None]
    num_steps: int

    async def start(self) -> None:
        """The engine is there already."""

    async def sample(self) -> Sample:
        return {_metric(level): self._tokens_per_s(level) for level in self.levels}

    async def stop(self) -> None:
        """It is stopped by who started it."""

    def _tokens_per_s(self, num_seqs: int) -> float:
        again = cycle(self.adapters)
        num_turns = -(-len(self.adapters) // num_seqs)
        steps = [_step(self.world, list(islice(again, num_seqs))) for _ in range(num_turns)]
        steps[0]()
        taken = [_timed(step) for step in islice(cycle(steps), max(self.num_steps, num_turns))]
        return 1000 * num_seqs / statistics.median(taken)


def _step(world: World, adapters: Sequence[str | None]) -> Callable[[], object]:
    """What decodes one token of sequences with these adapters, again and again the same."""
    from replicas.engine.sequence import Plan as StepPlan

    plan = StepPlan(tuple(_decode(i, adapter, world.vocab_size) for i, adapter in enumerate(adapters)))
    return lambda: world.core.runner.execute(plan)


def _decode(index: int, adapter: str | None, vocab_size: int) -> PlanItem:
    """One token behind a context; what lies in the cache does not matter to the speed."""
    from replicas.engine.sequence import PlanItem, Sequence

    rng = Random(index)
    prompt = pack_tokens([rng.randrange(vocab_size) for _ in range(CONTEXT)])
    sampling = SamplingParams(max_tokens=8, seed=0, temperature=0.0, ignore_eos=True)
    request = GenerateRequest(request_id=f"{index}", prompt=prompt, sampling=sampling, adapter=adapter)
    seq = Sequence.from_request(request, 0.0)
    first = index * (CONTEXT // BLOCK)
    seq.block_ids = list(range(first, first + CONTEXT // BLOCK))
    return PlanItem(seq, CONTEXT - 1, 1, True)


def swaps(world: World, num_seqs: int, num_swaps: int) -> dict[str, float]:
    """Milliseconds that an adapter's way in and out takes between two steps, and steps with a load beside them and
    without: sequences decode while a thread reads one adapter after the other."""
    core, step = world.core, _step(world, [f"own-{i}" for i in range(num_seqs)])
    step()
    alone = [_timed(step) for _ in range(2 * num_swaps)]
    pauses: list[float] = []
    beside: list[float] = []
    loads: list[float] = []
    for _ in range(num_swaps):
        load = _Load(world)
        load.start()
        while load.is_alive():
            beside.append(_timed(step))
        loads.append(load.took_ms)
        pauses.append(_timed(load.install) + _timed(lambda: core.unload_adapter(world.spare.adapter_id)))
        step()
    return {
        "swap pause, ms, median": statistics.median(pauses),
        "swap pause, ms, longest": max(pauses),
        "load, ms, median": statistics.median(loads),
        "step alone, ms, median": statistics.median(alone),
        "step alone, ms, longest": max(alone),
        "step beside a load, ms, median": statistics.median(beside),
        "step beside a load, ms, longest": max(beside),
    }


class _Load(threading.Thread):
    """Reads the spare adapter as `ThreadedEngine` has it read."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.install: Callable[[], None] = lambda: None
        self.took_ms = 0.0
        self._world = world

    def run(self) -> None:
        began = time.perf_counter()
        self.install = self._world.core.read_adapter(self._world.spare)
        self.took_ms = 1000 * (time.perf_counter() - began)


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


async def run(workload: Workload, plan: Plan, notice: Notice) -> Report:
    """Measures batches, then swaps, then the fleet."""
    notice("loading adapters")
    with World.of(workload) as world:

        def side(name: str, levels: Sequence[int], adapters: Sequence[str | None]) -> Batches:
            return Batches(name, world, levels, adapters, workload.num_steps)

        sides = [
            side(BASE, sorted({*workload.levels, workload.num_mixed}), [None]),
            *(
                side(with_adapters(n), workload.batches_with(n), [f"own-{i}" for i in range(n)])
                for n in workload.levels
            ),
            side(MIXED, [workload.num_mixed], [f"mixed-{i}" for i in range(workload.num_mixed)]),
        ]
        samples = await alternate(sides, plan, notice)
        notice("swaps")
        pauses = swaps(world, min(8, *workload.levels[1:] or (1,)), workload.num_swaps)
    fleet = await measure(workload.model_dir, workload.fleet, plan, notice)
    title = f"LoRA: {workload.model_dir.name}, {workload.dtype}, rank {workload.rank} in all linear layers, 1 thread"
    facts = {"context": CONTEXT, **{name: round(ms, 3) for name, ms in pauses.items()}, **fleet.facts}
    every = Samples({**samples.by_side, **fleet.samples.by_side})
    return Report("lora", title, every, _ratios(samples, workload, fleet), facts)


def _metric(num_seqs: int) -> str:
    return f"tok/s, {num_seqs} sequences"


def with_adapters(num_adapters: int) -> str:
    """A side's name."""
    return "1 adapter" if num_adapters == 1 else f"{num_adapters} adapters"


def _ratios(samples: Samples, workload: Workload, fleet: Fleet) -> list[Ratio]:
    goals = {64: Goal.at_least(0.7)}
    found = [
        samples.ratio(_metric(n), with_adapters(num_adapters), BASE, goals.get(n))
        for num_adapters in workload.levels
        for n in workload.batches_with(num_adapters)
    ]
    return [*found, samples.ratio(_metric(workload.num_mixed), MIXED, BASE), *fleet.ratios()]
