"""`ops.deploy` builds Serve applications without any Ray running; in processes of their own, so that this one stays
without ray."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

PYTHON = [sys.executable, "-c"]
ROOT = Path(__file__).parents[2]


def run(script: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **(env or {})}
    return subprocess.run([*PYTHON, script], capture_output=True, text=True, env=environment, timeout=180, check=False)


def test_one_application_holds_ingress_groups_and_store():
    script = """
import json, os
from configs.load import load_config
from configs.runtime import Runtime
from ops.deploy import application
config = load_config("sim", {})
app = application(config, Runtime.from_config(config, {}, os.urandom))
ingress = app._bound_deployment
children = [c._bound_deployment for c in ingress.init_args[3:]]
print(json.dumps([[d.name, d.num_replicas, d.max_ongoing_requests, d.ray_actor_options] for d in (ingress, *children)]))
"""
    done = run(script)
    assert done.returncode == 0, done.stderr
    ingress, group, store = json.loads(done.stdout)
    assert [ingress[0], group[0], store[0]] == ["ingress", "group-sim", "store"]
    assert (ingress[2], group[1]) == (4096, 2)
    environment = group[3]["runtime_env"]["env_vars"]
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "1"


def test_arguments_of_build_are_checked_and_replace_the_profiles_redis_and_secret():
    script = """
from configs.errors import ConfigError
from ops.deploy import resolve
for args in ({}, {"profile": "sim", "config": {}}, {"profil": "sim"}, {"profile": "nope"}):
    try:
        resolve(args)
    except ConfigError as error:
        print(error)
config = resolve({"profile": "sim", "redis_url": "redis://r:6379", "secret_env": "MY_SECRET"})
print(config.redis.url, config.channel.secret_env, config.cluster)
"""
    neither, half, misspelt, unknown, good = run(script).stdout.splitlines()
    assert neither == "arguments of ops.deploy:build: give either profile or config"
    assert "missing required field `models`" in half
    assert "unknown field `profil`" in misspelt
    assert "no such profile" in unknown
    assert good == "redis://r:6379 MY_SECRET sim"


def test_a_drawn_secret_is_kept_and_found_by_the_next_build():
    with tempfile.TemporaryDirectory(prefix="w", dir="/tmp") as folder:  # pytest's are too long for sockets
        check_kept_secret(Path(folder))


def check_kept_secret(tmp_path: Path):
    script = """
from ops.deploy import build
print([build({"profile": "sim"})._bound_deployment.init_args[1].secret.hex() for _ in range(2)])
"""
    done = run(script, {"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout.replace("'", '"'))
    assert first == second
    (kept,) = tmp_path.glob("wg-*/sim-8000/secret")
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.read_bytes().hex() == first


BUILD_AS_RAY_DOES = """
import sys, yaml
from ray._common.utils import import_attr
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema
schema = ServeDeploySchema.model_validate(yaml.safe_load(sys.argv[1]))
(wanted,) = schema.applications
app = call_user_app_builder_with_args_if_necessary(import_attr(wanted.import_path), wanted.args)
built = build_app(app, name=wanted.name)
config, runtime = app._bound_deployment.init_args[:2]
names = sorted(d.name for d in built.deployments)
print(wanted.name, wanted.route_prefix, built.ingress_deployment_name, ",".join(names), config.cluster, runtime.secret)
"""


def serve_config_of_the_page() -> str:
    page = (ROOT / "docs" / "deploy.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    document = yaml.safe_load(block)
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayService")
    return str(document["spec"]["serveConfigV2"])


def test_the_serve_config_of_the_documentation_builds_as_ray_builds_it():
    with tempfile.TemporaryDirectory(prefix="w", dir="/tmp") as folder:  # pytest's are too long for sockets
        environment = {**os.environ, "TMPDIR": folder, "WARMGATE_CLUSTER_SECRET": "sixteen bytes it is"}
        command = [*PYTHON, BUILD_AS_RAY_DOES, serve_config_of_the_page()]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "warmgate / ingress group-sim,ingress,store demo b'sixteen bytes it is'"


def test_a_misspelt_key_in_a_serve_config_is_named():
    from_page = serve_config_of_the_page().replace("engine: {kind: sim}", "engine: {kin: sim}")
    done = subprocess.run([*PYTHON, BUILD_AS_RAY_DOES, from_page], capture_output=True, text=True, timeout=180)
    assert done.returncode != 0
    assert "unknown field `kin` - at `$.config.groups[0].engine`" in done.stderr
