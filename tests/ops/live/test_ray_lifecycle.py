"""Beginning and end of `warmgate serve`: two side by side, every way to stop it, every way not to start."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from ops.ray_cluster import free_block
from tests.ops import ray_stack
from tests.ops.ray_stack import Stack, alive, chat_body, eventually, text_of

pytestmark = pytest.mark.ray


@pytest.fixture
def second(tmp_path):
    """Starts another stack; whatever the test does with it, nothing of it outlives the test."""
    started: list[Stack] = []

    def start(*settings: str, profile: str = "sim") -> Stack:
        started.append(ray_stack.start(tmp_path / f"{len(started)}.log", *settings, profile=profile))
        return started[-1]

    yield start
    for stack in started:
        ray_stack.stop(stack)


def left(family: list[psutil.Process]) -> list[str]:
    return [f"{p.pid} {p.name()}" for p in family if alive(p)]


def test_an_instance_beside_another_drains_at_sigterm_and_leaves_no_process(stack: Stack, second):
    """The second one runs without HAProxy: both kinds answer alike."""
    other = second("ray.haproxy=off", "groups.0.engine.sim.step_base_s=0.02")
    other.wait_ready()
    before, family = stack.family(), other.family()
    assert stack.chat(seed=1).json()["choices"] == other.chat(seed=1).json()["choices"]
    with other.stream(max_tokens=100, ignore_eos=True, seed=1) as payloads:
        received = [next(payloads) for _ in range(5)]
        other.process.send_signal(signal.SIGTERM)
        received += payloads
    assert received[-1] == "[DONE]"
    assert len(text_of(received)) >= 90
    assert other.process.wait(90) == 0
    assert left(family) == []
    assert not Path(f"/tmp/wg-{os.getuid()}/ray-{other.port}").exists()
    assert left(before) == left(stack.family())
    assert stack.chat().status_code == 200


@pytest.mark.slow
def test_a_stream_longer_than_the_drain_ends_in_an_error_event(second):
    other = second("ray.drain_s=2", "groups.0.engine.sim.step_base_s=0.05")
    other.wait_ready()
    with other.stream(max_tokens=2000, ignore_eos=True) as payloads:
        next(payloads)
        other.process.send_signal(signal.SIGTERM)
        received = list(payloads)
    assert "[DONE]" not in received
    assert json.loads(received[-1])["error"]["code"] == "replica_lost"
    assert other.process.wait(90) == 0


def test_nothing_outlives_a_supervisor_that_was_killed(second):
    other = second()
    other.wait_ready()
    family = other.family()
    assert len(family) >= 10
    other.process.kill()
    assert eventually(lambda: left(family) == [], limit_s=30), left(family)


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_the_drain(second):
    other = second("ray.drain_s=60", "groups.0.engine.sim.step_base_s=0.05")
    other.wait_ready()
    family = other.family()
    with pytest.raises(httpx.HTTPError), other.stream(max_tokens=2000, ignore_eos=True) as payloads:
        next(payloads)
        other.interrupt_group()
        time.sleep(2.0)
        assert other.process.poll() is None
        begin = time.monotonic()
        other.interrupt_group()
        assert other.process.wait(10) == 130
        assert time.monotonic() - begin < 5
        for _ in payloads:
            pass
    assert eventually(lambda: left(family) == [], limit_s=5), left(family)


def test_ctrl_c_while_ray_starts_stops_what_has_started(second):
    other = second()
    assert eventually(lambda: other.named("raylet") != [], limit_s=60)
    family = other.family()
    other.interrupt_group()
    assert other.process.wait(90) == 0
    assert left(family) == []


def test_a_port_in_use_is_exit_code_2_and_starts_nothing(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        words = [sys.executable, "-m", "ops.cli", "serve", "sim", "--port", str(port)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "http.port" in done.stderr
    assert f"port {port} of 127.0.0.1 is in use" in done.stderr


@pytest.mark.slow
def test_a_step_that_fails_says_why_keeps_the_logs_and_leaves_no_process(second):
    other = second("telemetry.usage_log=/dev/null/usage.jsonl")
    assert other.process.wait(ray_stack.START_LIMIT_S) == 1
    said = other.log.read_text()
    assert "failed  ingress" in said
    assert "File exists: '/dev/null'" in said
    assert "Traceback (most recent call last)\n  File" not in said.split("ingress does not start")[0]
    (logs,) = [line.removeprefix("logs: ") for line in said.splitlines() if line.startswith("logs: ")]
    assert (Path(logs) / "gcs_server.out").exists()
    marker = f"ray-{other.port}/"
    assert [p.pid for p in psutil.process_iter() if marker in " ".join(p.cmdline() if alive(p) else [])] == []


BUILD = """
import os, shutil, sys
from configs.runtime import Runtime
from ops import ray_cluster
from ops.serve import guarded
from ops.guard import Mark

port, name = int(sys.argv[1]), sys.argv[2]
os.environ["WARMGATE_HTTP__PORT"] = str(port)
from configs.load import load_config
config = load_config("sim", os.environ)
runtime = Runtime.from_config(config, os.environ, os.urandom)
plan = ray_cluster.plan_cluster(config, runtime, ray_cluster.RayPorts.draw())
with guarded(Mark(str(runtime.run_dir), str(plan.folder))):
    ray_cluster.prepare_folder(plan)
    ray_cluster.start_cluster(plan)
    from ray import serve
    from ops.deploy import build
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build({"profile": name}), route_prefix="/")
    print("deployed", flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray_cluster.stop_cluster()
shutil.rmtree(plan.folder)
shutil.rmtree(runtime.run_dir)
"""


@pytest.mark.slow
def test_serve_run_builds_the_same_application(tmp_path):
    """As `serve run ops.deploy:build profile=sim` does, on a Ray of its own."""
    with contextlib.ExitStack() as running:
        for attempt in range(2):
            port, log = free_block(1), tmp_path / f"log{attempt}"
            driver = running.enter_context(built(port, log))
            ended = eventually(lambda log=log, of=driver: "deployed" in log.read_text() or of.poll() is not None, 120)
            if "Failed to connect to GCS" not in log.read_text():  # Ray ends the program when its own head is too slow
                break
        assert ended and driver.poll() is None, log.read_text()
        url = f"http://127.0.0.1:{port}"
        assert eventually(lambda: httpx.get(f"{url}/ready").json().get("replicas") == {"sim": 2})
        answer = httpx.post(f"{url}/v1/chat/completions", content=json.dumps(chat_body()), timeout=30)
        assert answer.json()["usage"]["completion_tokens"] == 8
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.stdin.close()
        assert driver.wait(60) == 0
    assert eventually(lambda: left(family) == [])


@contextlib.contextmanager
def built(port, log):
    """A program that deploys the application and waits for the end of its stdin."""
    words = [sys.executable, "-c", BUILD, str(port), "sim"]
    with (
        log.open("wb") as output,
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=output, stderr=output) as driver,
    ):
        yield driver
