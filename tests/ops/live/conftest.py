from collections.abc import Iterator

import pytest

from tests.ops import ray_stack
from tests.ops.ray_stack import Stack


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two ingress and two sim replicas behind HAProxy where there is one; tokens come slowly enough to be watched."""
    log = tmp_path_factory.mktemp("stack") / "serve.log"
    settings = ["http.ingress_replicas=2", "groups.0.engine.sim.step_base_s=0.02", "ray.drain_s=10"]
    started = ray_stack.start(log, *settings)
    try:
        started.wait_ready()
        yield started
    finally:
        ray_stack.stop(started)
