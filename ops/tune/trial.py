"""One candidate on trial: real replicas and an ingress, started when something has to be measured, under open load."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from configs.schema import Config, GroupConfig
from ops.bench.harness import BenchError
from ops.bench.load import load_process
from ops.bench.load_spec import Closed, LoadResult, LoadSpec, Open
from ops.bench.stack import Stack, StackOptions
from ops.gpu_memory import needs_gpu, num_devices
from ops.tune.errors import TrialError
from ops.tune.findings import Rate
from ops.tune.workload import Workload
from ops.valkey import ValkeyError
from replicas.threads import thread_environment

if TYPE_CHECKING:
    import tokenizers

START_S = 1200.0
"""A large model that compiles takes many minutes."""

ANSWER_S = 900.0
NUM_WARMUPS = 8
"""Requests that are sent first and not counted: the first steps of an engine are slow, and rates are learnt."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where trials run: model files, the tokenizer that prompts are made with, a folder for what processes say."""

    home: Path
    tokenizer: tokenizers.Tokenizer
    logs: Path


@dataclass(slots=True)
class Trial:
    """`async with`; the stack starts with the first `measure` and ends with the block."""

    config: Config
    workload: Workload
    place: Place
    _opened: AsyncExitStack = field(default_factory=AsyncExitStack)
    _stack: Stack | None = None

    async def __aenter__(self) -> Trial:
        return self

    async def __aexit__(self, *exception: object) -> None:
        try:
            await self._opened.aclose()
        finally:
            self.log.unlink(missing_ok=True)

    @property
    def started(self) -> bool:
        return self._stack is not None

    async def measure(self, rate: Rate) -> LoadResult:
        """All requests of the workload, at `rate` a second or all at once. Raises TrialError: the replicas did not
        start, or an answer was wrong."""
        try:
            if self._stack is None:
                self._stack = await self._start()
                self._check(await self._load(self._stack.port, self._warm_up()))
            return self._check(await self._load(self._stack.port, self._spec(rate)))
        except (BenchError, ValkeyError) as error:
            fallen = "" if self._stack is None else self._stack.fallen()
            raise TrialError(fallen or str(error)) from error

    @property
    def log(self) -> Path:
        return self.place.logs / "replicas.log"

    def keep_log(self, name: str) -> None:
        """Saves what the processes of a failed trial said from the next one."""
        if self.log.exists() and self.log.stat().st_size:
            shutil.copyfile(self.log, self.place.logs / f"{name}.log")

    async def _start(self) -> Stack:
        group = self.config.groups[0]
        self.log.write_bytes(b"")
        options = StackOptions(
            home=self.place.home, log=self.log, start_s=START_S, environment=lambda i: replica_environment(group, i)
        )
        return await self._opened.enter_async_context(Stack(self.config, options))

    def _warm_up(self) -> LoadSpec:
        return self._spec(None, run="warm-up", num_requests=min(NUM_WARMUPS, self.workload.num_requests))

    def _spec(self, rate: Rate, *, run: str = "", num_requests: int | None = None) -> LoadSpec:
        workload, num = self.workload, num_requests or self.workload.num_requests
        return LoadSpec(
            host="127.0.0.1",
            port=0,
            model=self.config.models[0].id,
            arrivals=Closed(num) if rate is None else Open(rate),
            num_requests=num,
            num_tokens=workload.output_tokens,
            route="/v1/completions",
            extra={"ignore_eos": True},
            prompts=workload.prompts(self.place.tokenizer, run or f"rate {rate}")[:num],
            timeout_s=ANSWER_S,
        )

    def _check(self, result: LoadResult) -> LoadResult:
        """What a replica leaves that died meanwhile is no measurement: its gateway goes on, and refuses."""
        assert self._stack is not None
        fallen = self._stack.fallen()
        if fallen:
            raise TrialError(fallen)
        if not result.num_ok:
            raise TrialError(f"none of {result.num_requests} requests was answered: {', '.join(result.faults)}")
        return result

    async def _load(self, port: int, spec: LoadSpec) -> LoadResult:
        async with load_process(msgspec.structs.replace(spec, port=port)) as load:
            await load.go()
            return await load.result()


def replica_environment(group: GroupConfig, number: int, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Threads, and the GPUs that are this replica's alone, as Ray gives them; several share one where the profile
    reserves a part of a GPU. Raises TrialError when there are too few."""
    threads = thread_environment(group.engine)
    if not needs_gpu(group):
        return {**threads, "CUDA_VISIBLE_DEVICES": ""}
    cards = [card for card in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if card] or _all_cards()
    each = num_devices(group) if num_devices(group) > 1 else group.resources.num_gpus or 1.0
    first = number // int(1 / each) if each < 1 else number * int(each)
    last = first + max(1, int(each))
    if last > len(cards):
        raise TrialError(
            f"replica {number + 1} of {group.replicas} needs a GPU more than the {len(cards)} that are here"
        )
    return {**threads, "CUDA_VISIBLE_DEVICES": ",".join(cards[first:last])}


def _all_cards() -> list[str]:
    """GPUs by number. nvidia's driver lists them as files."""
    return [str(i) for i in range(sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia*")))]
