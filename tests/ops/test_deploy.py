"""`ops.deploy` builds Serve applications without any Ray running; in processes of their own, so that this one stays
without ray."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PYTHON = [sys.executable, "-c"]


def run(script: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **(env or {})}
    return subprocess.run([*PYTHON, script], capture_output=True, text=True, env=environment, timeout=60, check=False)


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
