"""A bench stack that does not start says why, in a line."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import psutil
import pytest

from configs.schema import ModelConfig
from ops.bench.harness import BenchError
from ops.bench.stack import MODEL, Stack, StackOptions, sim_profile


async def test_a_replica_that_does_not_start_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    config = msgspec.structs.replace(sim_profile(0.0, 1), models=(ModelConfig(id=MODEL, source="./nowhere"),))
    log = tmp_path / "log"
    with pytest.raises(BenchError, match=r"^the replica r0 did not start: ConfigError: model './nowhere' is not at"):
        async with Stack(config, StackOptions(home=tmp_path, log=log)):
            pass
    assert "Traceback" in log.read_text()


async def test_a_stack_that_is_cancelled_while_it_ends_leaves_nothing(tmp_path: Path) -> None:
    stack = await Stack(sim_profile(0.0, 1)).__aenter__()
    folder, pids = stack._folder, [pid for pids in stack.roles.values() for pid in pids]
    assert folder is not None
    ending = asyncio.ensure_future(stack.__aexit__())
    await asyncio.sleep(0.01)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert not folder.exists()
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
