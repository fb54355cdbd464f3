"""The embedded Valkey as a Serve deployment of one replica: Serve places it, watches it and ends it with the rest.

One way for `warmgate serve` and for a bare `serve run`; its address is known beforehand (a socket in the run folder).
"""

from __future__ import annotations

from ray import serve
from ray.serve import Application

from configs.runtime import Runtime
from ops.valkey import EmbeddedValkey

STORE = "store"
HEALTH_PERIOD_S = 1.0


class Store:
    """Holds the server's process. A server that died is started again at the same socket, empty: members announce
    themselves anew and ingress replicas keep what they knew."""

    def __init__(self, runtime: Runtime) -> None:
        runtime.prepare()
        self._server = EmbeddedValkey(runtime.run_dir)
        self._server.start()

    def check_health(self) -> None:
        if not self._server.is_running():
            self._server.stop()
            self._server.start()

    def __del__(self) -> None:
        if hasattr(self, "_server"):
            self._server.stop()


def store(runtime: Runtime) -> Application:
    """The deployment, bound."""
    deployment = serve.deployment(
        name=STORE,
        num_replicas=1,
        graceful_shutdown_timeout_s=5.0,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=HEALTH_PERIOD_S,
        max_constructor_retry_count=3,
        ray_actor_options={"num_cpus": 0},
    )
    return deployment(Store).bind(runtime)
