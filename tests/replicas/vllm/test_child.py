"""Processes below a replica end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from replicas.contract import EngineError
from replicas.vllm import child
from replicas.vllm.versions import PLUGIN, PLUGINS
from tests.replicas.vllm.conftest import NEEDED

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
ROOT = Path(__file__).parents[3]

PARENT = """
import os, subprocess, sys
from replicas.vllm import child
os.environ[child.VARIABLE] = child.mark()
watched = "import time; from replicas.vllm.child import watch; watch(), watch(); print(1, flush=True); time.sleep(600)"
process = subprocess.Popen([sys.executable, "-c", watched], stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
process.wait()
"""

SERVING = """
import asyncio, os, psutil
from pathlib import Path
from replicas.vllm.launch import Wanted
from replicas.vllm_engine import VllmEngine
from tests.replicas.vllm.vllm_kit import config

async def main():
    engine = VllmEngine(Wanted(Path(os.environ["MODEL"]), config(self_check=False), "m"))
    await engine.start(lambda deltas: None)
    print(*[process.pid for process in psutil.Process().children(recursive=True)], flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


def ended(pids: list[int], limit_s: float) -> bool:
    end = time.monotonic() + limit_s
    while any(is_alive(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@linux
def test_a_child_ends_when_its_replica_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert ended([pid], 30.0)


def test_the_replica_itself_and_strangers_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "nonsense", child.mark()):
        monkeypatch.setenv(child.VARIABLE, value)
        child.watch()
        assert not [thread for thread in threading.enumerate() if thread.name == child._THREAD]


@linux
def test_a_number_that_somebody_else_has_by_now_counts_as_gone() -> None:
    own = f"{os.getpid()}:1"
    script = "from replicas.vllm import child; child.watch(); import time; time.sleep(600)"
    environment = {**os.environ, child.VARIABLE: own}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL


def test_vllm_finds_the_plugin() -> None:
    from importlib.metadata import entry_points

    (found,) = entry_points(group=PLUGINS, name=PLUGIN)
    assert found.load() is child.watch


@linux
@NEEDED
@pytest.mark.slow  # test_engine.py looks whether the engine core watches
@pytest.mark.vllm
@pytest.mark.model
@pytest.mark.timeout(300)
def test_a_killed_replica_leaves_no_engine_core_behind(smollm2: Path, tmp_path: Path) -> None:
    script = tmp_path / "serving.py"
    script.write_text(SERVING)
    environment = {**os.environ, "MODEL": str(smollm2), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as replica:
        assert replica.stdout is not None
        line = ""
        while not line.replace(" ", "").strip().isdigit():
            line = replica.stdout.readline()
            assert line, "vLLM did not start"
        pids = [int(pid) for pid in line.split()]
        names = [psutil.Process(pid).name() for pid in pids]
        assert any("EngineCor" in name for name in names), names
        replica.send_signal(signal.SIGKILL)
        replica.wait()
        assert ended(pids, 30.0), [psutil.Process(pid).cmdline() for pid in pids if is_alive(pid)]


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (ValueError("no room\nfor it"), "ValueError: no room"),
        (RuntimeError("Traceback (most recent call last):\n  File x\nValueError: too large"), "ValueError: too large"),
    ],
)
def test_the_first_failure_of_a_process_below_is_kept_in_a_line(raised: Exception, told: str, tmp_path: Path) -> None:
    script = (
        "import logging, sys; from replicas.vllm import child; child.watch()\n"
        f"for error in ({raised!r}, OSError('later')):\n"
        "    try: raise error\n"
        "    except Exception: logging.getLogger('vllm.v1.engine.core').exception('did not start')\n"
    )
    assert child.why(tmp_path) == ""
    environment = {**os.environ, child.VARIABLE: child.mark(), child.FOLDER: str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True, timeout=60)
    assert child.why(tmp_path) == told


@NEEDED
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.model
@pytest.mark.filterwarnings("ignore")
def test_why_vllm_does_not_start_is_told(smollm2: Path) -> None:
    from replicas.vllm.launch import Wanted, launch
    from tests.replicas.vllm.vllm_kit import config

    with pytest.raises(EngineError, match=r"vLLM did not start: ValueError: .*KV cache"):
        launch(Wanted(smollm2, config(self_check=False, kv_cache_gib=0.1, max_model_len=8192), "m"))
