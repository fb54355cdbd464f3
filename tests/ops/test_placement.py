"""Where Ray puts replicas that are split over several GPUs; the GPUs are pretended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from configs.schema import EngineConfig, GroupConfig, ResourcesConfig, VllmConfig

ROOT = Path(__file__).parents[2]

SCRIPT = """
import asyncio, json, os, sys, tempfile
from pathlib import Path
import ray
from ray import serve
from configs.load import load_config
from configs.runtime import Runtime
from msgspec.structs import replace
from replicas.deployment import replica_group


async def host(config, group, runtime, replica_id):
    import asyncio, json, os, ray
    from pathlib import Path
    from ray.util import get_current_placement_group, placement_group_table

    @ray.remote(num_gpus=1, num_cpus=0)
    def worker():  # as vLLM's executor asks for its own: a GPU of this replica's bundles
        return ray.get_runtime_context().get_node_id()

    nodes = await asyncio.gather(*[worker.remote() for _ in range(group.engine.vllm.tensor_parallel_size)])
    table = placement_group_table(get_current_placement_group())
    context = ray.get_runtime_context()
    found = {
        "bundles": sorted(table["bundles"].values(), key=str), "strategy": table["strategy"], "state": table["state"],
        "gpus_of_actor": context.get_assigned_resources().get("GPU", 0),
        "num_nodes": len({*nodes, context.get_node_id()}),
    }
    (Path(os.environ["FOUND"]) / replica_id).write_text(json.dumps(found))

    class Host:
        async def check_health(self): pass
        async def drain(self): pass
        async def close(self): pass

    return Host()


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    os.environ["FOUND"] = sys.argv[2]
    config = load_config("vllm-awq-tp", {})
    group = config.groups[0]
    vllm = replace(group.engine.vllm, tensor_parallel_size=wanted)
    group = replace(group, engine=replace(group.engine, vllm=vllm), replicas=4 // wanted)
    ray.init(num_cpus=16, num_gpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    serve.start(proxy_location="Disabled")
    runtime = Runtime.from_config(config, {}, os.urandom)
    serve.run(replica_group(config, group, runtime, host), name="g", route_prefix=None)
    print(json.dumps({"left": ray.available_resources().get("GPU", 0)}))
    serve.shutdown()
    ray.shutdown()
"""


@pytest.mark.ray
@pytest.mark.timeout(180)
@pytest.mark.parametrize("num_gpus", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_replica_gets_a_bundle_for_each_gpu_on_one_node(num_gpus: int, tmp_path: Path) -> None:
    script = tmp_path / "place.py"
    script.write_text(SCRIPT)
    folder = tmp_path / "found"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(script), str(num_gpus), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    left = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert [json.loads(line) for line in left] == [{"left": 0}]
    replicas = [json.loads(path.read_text()) for path in folder.iterdir()]
    assert len(replicas) == 4 // num_gpus
    for found in replicas:
        assert found["bundles"] == [{"CPU": 2.0, "GPU": 1.0}] * num_gpus
        assert (found["strategy"], found["state"]) == ("STRICT_PACK", "CREATED")
        assert (found["gpus_of_actor"], found["num_nodes"]) == (0, 1)


def options(**vllm: int) -> tuple[dict[str, object], dict[str, object]]:
    script = """
import json, sys
from msgspec import convert
from configs.schema import GroupConfig
from replicas.deployment import actor_options, placement
group = convert(json.loads(sys.argv[1]), GroupConfig)
print(json.dumps([placement(group), actor_options(group)]))
"""
    group = {"name": "g", "model": "m", "engine": {"kind": "vllm", "vllm": vllm}, "resources": {"num_gpus": 1}}
    done = subprocess.run([sys.executable, "-c", script, json.dumps(group)], capture_output=True, text=True, check=True)
    placed, actor = json.loads(done.stdout)
    return placed, actor


def test_one_gpu_needs_no_bundles_and_pipelines_may_spread() -> None:
    placed, actor = options(tensor_parallel_size=1)
    assert placed == {} and actor["num_gpus"] == 1
    placed, actor = options(tensor_parallel_size=2, pipeline_parallel_size=2)
    assert placed["placement_group_strategy"] == "PACK" and len(placed["placement_group_bundles"]) == 4  # type: ignore[arg-type]
    assert actor["num_gpus"] == 0


def test_on_a_cpu_nothing_is_reserved_for_gpus() -> None:
    group = GroupConfig(
        name="g",
        model="m",
        engine=EngineConfig(kind="vllm", device="cpu", vllm=VllmConfig(tensor_parallel_size=2)),
        resources=ResourcesConfig(),
    )
    script = "import sys, msgspec; from replicas.deployment import placement; from configs.schema import GroupConfig; "
    script += "print(placement(msgspec.json.decode(sys.argv[1], type=GroupConfig)))"
    words = [sys.executable, "-c", script, msgspec.json.encode(group).decode()]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == "{}"
