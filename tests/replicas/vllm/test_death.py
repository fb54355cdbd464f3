"""How a vLLM engine dies: noticed within seconds, told to everyone once."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import psutil
import pytest

from replicas.contract import EngineDeadError, RefusedError
from tests.replicas.vllm.conftest import NEEDED
from tests.replicas.vllm.vllm_kit import MARKS, STORY, Driver, config, eventually, tokenizer_of, tokens_of

pytestmark = [*MARKS, NEEDED]


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def started(smollm2: Path) -> Driver:
    from replicas.vllm.launch import Wanted
    from replicas.vllm_engine import VllmEngine

    driver = Driver(tokenizer_of(smollm2))
    driver.engine = VllmEngine(Wanted(smollm2, config(self_check=False), "m"))
    driver.facts = await driver.engine.start(driver.take)
    return driver


@pytest.mark.parametrize(
    ("victim", "signum", "limit_s"),
    [
        pytest.param("EngineCore", signal.SIGKILL, 5.0, id="engine core killed"),
        pytest.param("Worker", signal.SIGKILL, 8.0, id="worker killed", marks=pytest.mark.slow),
        pytest.param("Worker", signal.SIGSTOP, 12.0, id="worker frozen", marks=pytest.mark.slow),
    ],
)
async def test_a_dead_engine_is_found_out(smollm2: Path, victim: str, signum: int, limit_s: float) -> None:
    driver = await started(smollm2)
    engine = driver.engine
    try:
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
    finally:
        await engine.close()
    await eventually(lambda: not any(map(is_alive, processes)))


@pytest.mark.slow
async def test_drain_lets_the_running_end_and_close_ends_all(smollm2: Path) -> None:
    driver = await started(smollm2)
    engine = driver.engine
    processes = engine._launched.processes
    running = driver.request(STORY, max_tokens=20, ignore_eos=True)
    engine.submit(running)
    drained = asyncio.ensure_future(engine.drain())
    await asyncio.sleep(0.1)
    with pytest.raises(RefusedError) as refused:
        engine.submit(driver.request(STORY))
    assert refused.value.fault.code == "draining" and engine.stats().draining
    await asyncio.wait_for(drained, 60)
    assert driver.deltas[running.request_id][-1].finish_reason == "length"
    await engine.close()
    await engine.close()
    await eventually(lambda: not any(map(is_alive, processes)))
