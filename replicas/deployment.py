"""A replica group as a Ray Serve deployment: Serve places, restarts and ends the actors; tokens never pass through it.

Requests arrive over the channel, so Serve counts none of them: draining is ours, in `__del__`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeAlias

from ray import serve
from ray.serve import Application

from configs.logs import set_log_level
from configs.runtime import Runtime
from configs.schema import Config, GroupConfig
from replicas.threads import thread_environment

HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 10.0
DRAIN_MARGIN_S = 2.0


class Host(Protocol):
    """What runs inside the actor: engine, channel server, membership (`replicas.host.ReplicaHost`)."""

    async def check_health(self) -> None:
        """Raises when this process should be replaced."""
        ...

    async def drain(self) -> None:
        """Leaves the membership, refuses new requests and returns when the running ones have ended."""
        ...

    async def close(self) -> None: ...


HostFactory: TypeAlias = Callable[[Config, GroupConfig, Runtime, str], Awaitable[Host]]
"""(config, group, runtime, replica_id) → a host that is ready to generate."""


async def replica_host(config: Config, group: GroupConfig, runtime: Runtime, replica_id: str) -> Host:
    """The real host, started."""
    from replicas.host import ReplicaHost  # here, so that the ingress and the supervisor do not load an engine

    runtime.prepare()
    host = ReplicaHost(config, group, runtime, replica_id)
    await host.start()
    return host


class Replica:
    """One replica process. A replacement for a dead one is a new process with a new id: it announces itself anew."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: Config, group: GroupConfig, runtime: Runtime, host_factory: HostFactory
    ) -> None:
        set_log_level(config.telemetry.log_level)
        self._drain_s = config.ray.drain_s
        self._host = await host_factory(config, group, runtime, f"{group.name}-{secrets.token_hex(4)}")

    async def check_health(self) -> None:
        await self._host.check_health()

    async def __del__(self) -> None:
        host = getattr(self, "_host", None)  # absent when starting failed
        if host is None:
            return
        try:
            # What still runs at the end of the time ends with the engine: each of its streams gets an error event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._drain_s):
                    await host.drain()
        finally:
            await host.close()


def replica_group(config: Config, group: GroupConfig, runtime: Runtime, host_factory: HostFactory) -> Application:
    """The deployment of one group, bound."""
    deployment = serve.deployment(
        name=group_deployment(group),
        num_replicas=group.replicas,
        graceful_shutdown_timeout_s=config.ray.drain_s + DRAIN_MARGIN_S,
        graceful_shutdown_wait_loop_s=0.25,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        max_constructor_retry_count=3,
        ray_actor_options=actor_options(group),
        **placement(group),
    )
    return deployment(Replica).bind(config, group, runtime, host_factory)


def group_deployment(group: GroupConfig) -> str:
    """The Serve deployment's name for a group."""
    return f"group-{group.name}"


def placement(group: GroupConfig) -> dict[str, Any]:
    """A bundle for each GPU of a replica that is split over several. The actor itself lives in the first one, vLLM's
    workers take one each. Tensor parallelism talks in every layer: one node. Stages of a pipeline may lie apart.
    """
    vllm = group.engine.vllm
    if not is_split(group):
        return {}
    bundle = {"CPU": max(group.resources.num_cpus, 1.0), "GPU": 1.0}
    return {
        "placement_group_bundles": [bundle] * (vllm.tensor_parallel_size * vllm.pipeline_parallel_size),
        "placement_group_strategy": "STRICT_PACK" if vllm.pipeline_parallel_size == 1 else "PACK",
    }


def is_split(group: GroupConfig) -> bool:
    """Whether a replica runs on several GPUs."""
    vllm = group.engine.vllm
    num_devices = vllm.tensor_parallel_size * vllm.pipeline_parallel_size
    return group.engine.kind == "vllm" and num_devices > 1 and group.engine.device != "cpu"


def actor_options(group: GroupConfig) -> dict[str, object]:
    """What Ray reserves for a replica, and the environment its process has before torch is loaded."""
    return {
        "num_cpus": group.resources.num_cpus,
        "num_gpus": 0 if is_split(group) else group.resources.num_gpus,
        "runtime_env": {"env_vars": thread_environment(group.engine)},
    }
