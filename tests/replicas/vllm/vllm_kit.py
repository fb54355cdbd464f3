"""Drives one engine: requests by text, deltas by request."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import tokenizers

from configs.schema import EngineConfig
from replicas.contract import (
    EngineDeadError,
    EngineFacts,
    GenerateRequest,
    RefusedError,
    SamplingParams,
    StepDelta,
    pack_tokens,
)

MARKS = [
    pytest.mark.vllm,
    pytest.mark.model,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own, and those of what it imports
]
FRANCE = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
STORY = "<|im_start|>user\nTell a long story about a dragon and a lighthouse.<|im_end|>\n<|im_start|>assistant\n"


def config(**settings: Any) -> EngineConfig:
    small: dict[str, Any] = {"kv_cache_gib": 0.25, "max_model_len": 1024, "max_num_seqs": 8, "block_size": 32}
    return EngineConfig(kind="vllm", dtype="float32", **small | settings)


@dataclass
class Driver:
    """`engine` is started; its deltas come to `take`."""

    tokenizer: tokenizers.Tokenizer
    engine: Any = None
    facts: EngineFacts | None = None
    deltas: dict[str, list[StepDelta]] = field(default_factory=lambda: defaultdict(list))
    ended: dict[str, asyncio.Event] = field(default_factory=lambda: defaultdict(asyncio.Event))
    num_requests: int = 0

    def take(self, deltas: Sequence[StepDelta]) -> None:
        for delta in deltas:
            self.deltas[delta.request_id].append(delta)
            if delta.finish_reason is not None:
                self.ended[delta.request_id].set()

    def request(self, text: str, **more: Any) -> GenerateRequest:
        """Keywords of the request, or of its sampling."""
        self.num_requests += 1
        known = {name: more.pop(name) for name in list(more) if name in GenerateRequest.__struct_fields__}
        sampling = SamplingParams(**{"max_tokens": 16, "seed": 1, "temperature": 0.0} | more)
        prompt = pack_tokens(self.tokenizer.encode(text).ids)
        defaults: dict[str, Any] = {"request_id": f"r{self.num_requests}", "prompt": prompt, "sampling": sampling}
        return GenerateRequest(**defaults | known)

    async def run(self, request: GenerateRequest) -> list[StepDelta]:
        self.engine.submit(request)
        return await self.end_of(request.request_id)

    async def end_of(self, request_id: str) -> list[StepDelta]:
        await asyncio.wait_for(self.ended[request_id].wait(), 120)
        return self.deltas[request_id]

    async def ask(self, text: str, **more: Any) -> list[StepDelta]:
        return await self.run(self.request(text, **more))

    def text_of(self, deltas: Sequence[StepDelta]) -> str:
        return self.tokenizer.decode(list(tokens_of(deltas)), skip_special_tokens=True)


def tokens_of(deltas: Sequence[StepDelta]) -> tuple[int, ...]:
    return tuple(token for delta in deltas for token in delta.token_ids)


async def eventually(holds: Any, limit_s: float = 60.0) -> None:
    async with asyncio.timeout(limit_s):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def tokenizer_of(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


async def dies(driver: Driver, victim: str, signum: int, limit_s: float) -> None:
    """Ends the engine by a signal to the process named so: all who have requests there are told in time, and once; all
    of its processes end."""
    engine = driver.engine
    processes = engine._launched.processes
    target = next(p for p in processes if victim[:6] in " ".join([p.name(), *p.cmdline()]))
    requests = [driver.request(STORY, max_tokens=500, ignore_eos=True) for _ in range(3)]
    for request in requests:
        engine.submit(request)
    await eventually(lambda: all(len(tokens_of(driver.deltas[r.request_id])) > 2 for r in requests), 60)
    began = time.monotonic()
    target.send_signal(signum)
    for request in requests:
        last = (await driver.end_of(request.request_id))[-1]
        assert last.fault is not None and (last.fault.code, last.fault.retryable) == ("engine_dead", True)
    assert time.monotonic() - began < limit_s
    with pytest.raises(EngineDeadError):
        engine.stats()
    with pytest.raises(RefusedError):
        engine.submit(driver.request(STORY))
    assert all(sum(d.finish_reason is not None for d in driver.deltas[r.request_id]) == 1 for r in requests)
    await engine.close()
    await eventually(lambda: not any(map(is_alive, processes)))


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def watched_by(pid: int) -> set[int]:
    """The processes whose end a process waits for, by its descriptors (Linux)."""
    lines = [line for info in Path(f"/proc/{pid}/fdinfo").iterdir() for line in info.read_text().splitlines()]
    return {int(line.removeprefix("Pid:")) for line in lines if line.startswith("Pid:")}
