"""How a vLLM engine dies: noticed within seconds, told to everyone once."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from replicas.contract import RefusedError
from tests.replicas.vllm.conftest import NEEDED
from tests.replicas.vllm.vllm_kit import MARKS, STORY, Driver, config, dies, eventually, is_alive, tokenizer_of

pytestmark = [*MARKS, NEEDED]


async def started(smollm2: Path) -> Driver:
    from replicas.vllm.launch import Wanted
    from replicas.vllm_engine import VllmEngine

    driver = Driver(tokenizer_of(smollm2))
    driver.engine = VllmEngine(Wanted(smollm2, config(self_check=False), "m"))
    driver.facts = await driver.engine.start(driver.take)
    return driver


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "limit_s"),
    [pytest.param(signal.SIGKILL, 8.0, id="killed"), pytest.param(signal.SIGSTOP, 12.0, id="frozen")],
)
async def test_a_dead_worker_is_found_out(smollm2: Path, signum: int, limit_s: float) -> None:
    """An engine core that is killed: at the end of test_engine.py."""
    driver = await started(smollm2)
    try:
        await dies(driver, "Worker", signum, limit_s)
    finally:
        await driver.engine.close()


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
