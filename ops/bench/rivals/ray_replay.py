"""Replays over Ray Serve handles, with Ray's request routers or ours: `python -m ops.bench.rivals.ray_replay`.

For every JSON line (`Job`): says `ready` when the replicas run, waits for a line, takes the deployment down after the
replay, answers with the outcomes as JSON. Ends with its input. One Ray for all of them.
"""

from __future__ import annotations

import asyncio
import os
import string
import sys
import time
from itertools import count
from random import Random
from typing import Any, Literal, TypeAlias

import msgspec

from configs.schema import EngineConfig
from ops.bench.contestants.wire import claim_stdout
from ops.bench.replay import Ask, Outcome, replay
from ops.bench.rivals.private_ray import private_ray
from ops.bench.trace_slice import ReplayRequest
from routing.prefix import TOKEN_BYTES

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


OURS = "routing.ray_router.WarmgateRouter"

Author: TypeAlias = Literal["ray", "warmgate"]


class Job(msgspec.Struct, frozen=True):
    """One visit: the rule of that name in `ROUTERS`, or our policy of the same name in the same place."""

    rule: str
    num_replicas: int
    engine: EngineConfig
    requests: list[ReplayRequest]
    block_tokens: int
    author: Author

    @property
    def router_config(self) -> dict[str, Any]:
        if self.author == "ray":
            return ROUTERS[self.rule]
        block_tokens = max(1, self.block_tokens // TOKEN_BYTES)  # it takes four bytes of text for a token
        return {
            "request_router_class": OURS,
            "request_router_kwargs": {"policy": self.rule, "block_tokens": block_tokens},
        }


async def run(job: Job, out: Any, number: int) -> list[Outcome]:
    """Deploys, tells that it has, waits to be told, and replays. Serve must run."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from ops.bench.rivals.ray_replica import Prompt, SimReplica

    engine = msgspec.json.encode(job.engine)
    deployment: Any = serve.deployment(
        num_replicas=job.num_replicas,
        max_ongoing_requests=10_000,
        request_router_config=RequestRouterConfig(**job.router_config),
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_wait_loop_s=0.1,
    )(SimReplica)
    name = f"replay{number}"
    handle: Any = await asyncio.to_thread(serve.run, deployment.bind(engine), name=name, route_prefix=None)
    stream = handle.options(stream=True).generate
    serial = count()

    async def ask(index: int, request: ReplayRequest, intended: float) -> Outcome:
        answer = stream.remote(Prompt(f"{index} {next(serial)}", request.prompt, request.max_tokens))
        replica, num_cached = await anext(answer)
        ttft_s = time.perf_counter() - intended
        num_tokens = await anext(answer)
        assert num_tokens == request.max_tokens, f"{num_tokens=} {request.max_tokens=}"
        return Outcome(ttft_s, len(request.prompt), num_cached, replica)

    try:
        await _connect(ask, job.num_replicas)
        print("ready", file=out, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return await replay(job.requests, ask)
    finally:
        await asyncio.to_thread(serve.delete, name)


async def _connect(ask: Ask, num_replicas: int) -> None:
    """Sends strangers until every replica has answered one: the first call of each takes much longer."""
    seen: set[str] = set()
    random = Random(0)
    while len(seen) < num_replicas:
        strangers = ["".join(random.choices(string.ascii_uppercase, k=32)) for _ in range(2 * num_replicas)]
        asked = [ask(-1, ReplayRequest(0.0, prompt, 1, 1.0), 0.0) for prompt in strangers]
        seen |= {outcome.replica for outcome in await asyncio.gather(*asked)}


async def serve_jobs(out: Any) -> None:
    """Job after job, on one loop: that is where handles live."""
    from ray import serve

    await asyncio.to_thread(serve.start, proxy_location="Disabled")
    try:
        number = 0
        while line := await asyncio.to_thread(sys.stdin.readline):
            number += 1
            outcomes = await run(msgspec.json.decode(line, type=Job), out, number)
            print(msgspec.json.encode(outcomes).decode(), file=out, flush=True)
    finally:
        await serve.shutdown_async()  # type: ignore[no-untyped-call]


def main() -> None:
    """Replays until the input ends."""
    out = claim_stdout()
    os.environ["OMP_NUM_THREADS"] = "1"
    with private_ray():
        asyncio.run(serve_jobs(out))


if __name__ == "__main__":
    main()
