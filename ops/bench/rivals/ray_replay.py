"""A replay over Ray Serve handles, with one of Ray's request routers: `python -m ops.bench.rivals.ray_replay`.

Reads one JSON line (`Job`), says `ready` when the replicas run, waits for a line, answers with the outcomes as JSON.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

import msgspec

from configs.schema import EngineConfig
from ops.bench.contestants.wire import claim_stdout
from ops.bench.replay import Outcome, ReplayRequest, replay
from ops.bench.rivals.private_ray import private_ray

AFFINITY = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router.PrefixCacheAffinityRouter"
"""What `ray.serve.llm.request_router` exports; that package cannot be imported without vLLM or SGLang."""

ROUTERS: dict[str, dict[str, Any]] = {
    "prefix_affinity": {"request_router_class": AFFINITY},
    "prefix_affinity_balanced": {
        "request_router_class": AFFINITY,
        "request_router_kwargs": {"imbalanced_threshold": 10},
    },
    "power_of_two": {},
}
"""`RequestRouterConfig`s by the name of the policy that restates each."""


class Job(msgspec.Struct, frozen=True):
    router: str
    num_replicas: int
    engine: EngineConfig
    requests: list[ReplayRequest]


async def run(job: Job, out: Any) -> list[Outcome]:
    """Deploys, tells that it has, and replays."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from ops.bench.rivals.ray_replica import Prompt, SimReplica

    router = RequestRouterConfig(**ROUTERS[job.router])
    engine = msgspec.json.encode(job.engine)
    deployment: Any = serve.deployment(
        num_replicas=job.num_replicas,
        max_ongoing_requests=10_000,
        request_router_config=router,
        ray_actor_options={"num_cpus": 0.1},
    )(SimReplica)
    await asyncio.to_thread(serve.start, proxy_location="Disabled")
    try:
        handle: Any = await asyncio.to_thread(serve.run, deployment.bind(engine), route_prefix=None)
        stream = handle.options(stream=True).generate

        async def ask(index: int, request: ReplayRequest, intended: float) -> Outcome:
            answer = stream.remote(Prompt(f"r{index}", request.prompt, request.max_tokens))
            num_cached = await anext(answer)
            ttft_s = time.perf_counter() - intended
            num_tokens = await anext(answer)
            assert num_tokens == request.max_tokens, f"{num_tokens=} {request.max_tokens=}"
            return Outcome(ttft_s, len(request.prompt), num_cached)

        warm_up = ReplayRequest(0.0, "one request before, so that the handle is connected", 1, 1.0)
        await ask(-1, warm_up, 0.0)
        print("ready", file=out, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return await replay(job.requests, ask)
    finally:
        await serve.shutdown_async()  # type: ignore[no-untyped-call]


def main() -> None:
    """One replay."""
    out = claim_stdout()
    os.environ["OMP_NUM_THREADS"] = "1"
    job = msgspec.json.decode(sys.stdin.readline(), type=Job)
    with private_ray():
        outcomes = asyncio.run(run(job, out))
    print(msgspec.json.encode(outcomes).decode(), file=out, flush=True)


if __name__ == "__main__":
    main()
