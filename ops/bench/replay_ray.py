"""Replaying over Ray Serve: another process (`rivals.ray_replay`) holds the Ray, the deployments and the handles."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import IO

import msgspec

from ops.bench.children import child, line_of
from ops.bench.harness import BenchError
from ops.bench.replay import Outcome, Play
from ops.bench.rivals.ray_replay import Job
from ops.bench.trace_slice import ReplayRequest

READY_S = 120.0


class RayReplays:
    """One private Ray for every visit of a bench; it starts with the first, and ends with the `async with` block."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._process: asyncio.subprocess.Process | None = None
        self._log: IO[bytes] | None = None

    async def __aenter__(self) -> RayReplays:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and kind is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            await self._process.wait()
        await self._stack.aclose()

    @contextlib.asynccontextmanager
    async def deployed(self, job: Job) -> AsyncIterator[Play]:
        """The job's deployment, ready to play its requests once. Raises BenchError with the end of what was logged."""
        try:
            process = await self._running()
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(job) + b"\n")
            await line_of(process, READY_S)

            async def play(requests: Sequence[ReplayRequest]) -> list[Outcome]:
                assert process.stdin is not None
                assert len(requests) == len(job.requests), "the process plays the requests it was given"
                process.stdin.write(b"go\n")
                return msgspec.json.decode(await line_of(process, math.inf), type=list[Outcome])

            yield play
        except BenchError as error:
            raise BenchError(f"{error}: {self._said()}") from error

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            pipe = asyncio.subprocess.PIPE
            self._log = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (the stack closes it)
            command = (sys.executable, "-m", "ops.bench.rivals.ray_replay")
            process = child(*command, stdin=pipe, stdout=pipe, stderr=self._log.fileno())
            self._process = await self._stack.enter_async_context(process)
        return self._process

    def _said(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip()[-800:]
