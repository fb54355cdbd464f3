"""A Ray of one's own for a while: loopback, own folder, own ports; ended by pid."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

from configs.runtime import Runtime
from configs.schema import Config, GroupConfig, HttpConfig, ModelConfig, RayConfig, TenantConfig
from ops import ray_cluster
from ops.guard import Mark
from ops.serve import guarded


@contextlib.contextmanager
def private_ray() -> Iterator[None]:
    """Starts Ray under this process (ray must not be imported yet) and ends it with the block. No HAProxy: it would
    spread an ingress's requests itself, past every request router."""
    port = ray_cluster.free_block(1)
    config = Config(
        cluster=f"ray{os.getpid()}",
        models=(ModelConfig(id="sim", source="sim:bytes"),),
        groups=(GroupConfig(name="sim", model="sim"),),
        tenants=(TenantConfig(id="bench", anonymous=True),),
        http=HttpConfig(port=port),
        ray=RayConfig(haproxy="off"),
    )
    runtime = Runtime.from_config(config, os.environ, os.urandom)
    plan = ray_cluster.plan_cluster(config, runtime, ray_cluster.RayPorts.draw())
    try:
        with guarded(Mark(str(runtime.run_dir), str(plan.folder))):
            ray_cluster.prepare_folder(plan)
            ray_cluster.start_cluster(plan)
            try:
                yield
            finally:
                ray_cluster.stop_cluster()
    finally:
        shutil.rmtree(plan.folder, ignore_errors=True)
        shutil.rmtree(runtime.run_dir, ignore_errors=True)
