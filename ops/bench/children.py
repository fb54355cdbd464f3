"""Processes of a bench: they end with their block, and say single lines."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from typing import Any

from ops.bench.harness import BenchError


@contextlib.asynccontextmanager
async def child(*command: str, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that ends with the block; it is asked first. `options` as of `subprocess.Popen`."""
    process = await asyncio.create_subprocess_exec(*command, limit=2**26, **options)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 20)
        if process.returncode is None:
            process.kill()
            await process.wait()


async def line_of(process: asyncio.subprocess.Process, limit_s: float) -> bytes:
    """The next line a process says. Raises BenchError when it ends, or says nothing for that long."""
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), None if math.isinf(limit_s) else limit_s)
    except TimeoutError as error:
        raise BenchError(f"a process said nothing for {limit_s:g} s") from error
    if not line:
        raise BenchError(f"a process ended with status {await process.wait()}")
    return line
