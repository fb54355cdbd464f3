"""Tokens over a Ray Serve DeploymentHandle, in throughput mode: what the channel replaces.

`python -m ops.bench.rivals.ray_handle STREAMS` says 0 when it is ready; for every line it reads it runs STREAMS streams
and prints the chunks per CPU-second of caller and replica.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from ops.bench.contestants.wire import claim_stdout

NUM_CHUNKS = 512


async def main(concurrency: int) -> None:
    """Runs the streams on a private Ray and reads the CPU of both actors."""
    out = claim_stdout()
    os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve

    from ops.bench.cpu import process_cpu_s

    @serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})
    class Streamer:
        async def stream(self, num_chunks: int) -> Any:
            for _ in range(num_chunks):
                yield "token "
                await asyncio.sleep(0)

        async def pid(self) -> int:
            return os.getpid()

    @serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})
    class Caller:
        def __init__(self, streamer: Any) -> None:
            self._streamer = streamer

        async def pids(self) -> list[int]:
            return [os.getpid(), await self._streamer.pid.remote()]

        async def drive(self, num_streams: int) -> int:
            async def one() -> int:
                chunks = self._streamer.options(stream=True).stream.remote(NUM_CHUNKS)
                return sum([1 async for _ in chunks])

            return sum(await asyncio.gather(*(one() for _ in range(num_streams))))

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    try:
        serve.start(proxy_location="Disabled")  # its HTTP proxy would take port 8000
        caller = serve.run(Caller.bind(Streamer.bind()), route_prefix=None)  # type: ignore[attr-defined]
        pids = await caller.pids.remote()
        await caller.drive.remote(concurrency)
        print(0, file=out)
        while await asyncio.to_thread(sys.stdin.readline):
            before = sum(process_cpu_s(pid) for pid in pids)
            num_chunks = await caller.drive.remote(concurrency)
            print(num_chunks / (sum(process_cpu_s(pid) for pid in pids) - before), file=out)
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
