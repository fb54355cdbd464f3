"""The gateway as a Ray Serve ingress: one ASGI app per ingress replica, composed in its own event loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias

from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from configs.logs import set_log_level
from configs.runtime import Runtime
from configs.schema import Config
from gateway import garbage

INGRESS = "ingress"
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 10.0
SHUTDOWN_MARGIN_S = 5.0
"""Seconds an ingress outlives its replicas' drain."""


class ServedApp(Protocol):
    """A composed gateway: the ASGI app and what must be closed after it."""

    @property
    def app(self) -> ASGIApp: ...

    def check_health(self) -> None:
        """Raises when this process should be replaced."""
        ...

    async def close(self) -> None: ...


AppFactory: TypeAlias = Callable[[Config, Runtime], Awaitable[ServedApp]]


async def gateway_app(config: Config, runtime: Runtime) -> ServedApp:
    """The real gateway: composed, started and ready to take requests."""
    from gateway.compose import compose  # here, so that a replica or the supervisor does not load it

    runtime.prepare()
    gateway = await compose(config, runtime)
    await gateway.start()
    return gateway


class Ingress:
    """One ingress replica. Serve sends it traffic when `__init__` has returned, and ends it with `__del__`, which
    runs after the last response (or when `graceful_shutdown_timeout_s` has passed)."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: Config, runtime: Runtime, app_factory: AppFactory, *_groups: object
    ) -> None:
        set_log_level(config.telemetry.log_level)
        self._served = await app_factory(config, runtime)
        garbage.settle()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._served.app

    def check_health(self) -> None:
        self._served.check_health()

    async def __del__(self) -> None:
        served = getattr(self, "_served", None)  # absent when composing failed
        if served is not None:
            await served.close()


def ingress(
    config: Config, runtime: Runtime, app_factory: AppFactory, groups: tuple[Application, ...], num_cpus: float
) -> Application:
    """The ingress deployment, bound; `groups` are bound to it so that one Serve application deploys everything."""
    deployment = serve.deployment(
        name=INGRESS,
        num_replicas=config.http.ingress_replicas,
        max_ongoing_requests=config.http.max_ongoing_requests,
        max_queued_requests=config.http.max_ongoing_requests,
        # Longer than the replicas drain: whoever is cut off there must still be told here.
        graceful_shutdown_timeout_s=config.ray.drain_s + SHUTDOWN_MARGIN_S,
        graceful_shutdown_wait_loop_s=0.25,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        max_constructor_retry_count=3,
        ray_actor_options={"num_cpus": num_cpus},
    )
    return deployment(serve.ingress()(Ingress)).bind(config, runtime, app_factory, *groups)
