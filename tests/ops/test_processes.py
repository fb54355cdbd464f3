import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ops import guard
from ops.processes import Family

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
SLEEP = ["sleep", "600"]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def eventually(holds, limit_s: float = 30.0) -> bool:
    end = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_only_processes_gained_since_then_are_ended():
    with subprocess.Popen(SLEEP) as before:
        family = Family()
        with subprocess.Popen(SLEEP) as after:
            assert [p.pid for p in family.members()] == [after.pid]
            assert family.end(grace_s=5.0) == []
            assert not alive(after.pid)
        assert alive(before.pid)
        before.kill()


def test_a_member_that_ignores_sigterm_is_killed_and_named():
    family = Family()
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert family.end(grace_s=0.3) == [child.pid]
        assert not alive(child.pid)


@linux
def test_an_orphan_whose_parent_died_is_adopted_and_ended():
    """In a process of its own: adopting orphans is for life."""
    script = """
import subprocess, sys, time
from ops.processes import Family, adopt_orphans
assert adopt_orphans()
family = Family()
parent = subprocess.run(["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 & echo $!"], capture_output=True, text=True)
orphan = int(parent.stdout)
assert [p.pid for p in family.members()] == [orphan], family.members()
family.end(5.0)
assert family.members() == []
print(orphan)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not alive(int(done.stdout))


@linux
def test_the_guard_ends_what_a_killed_supervisor_left(tmp_path):
    """The supervisor is SIGKILLed; its child is in a session of its own and would live on."""
    script = f"""
import os, subprocess, sys, time
from ops import guard
from ops.serve import guarded
with guarded(guard.Mark({str(tmp_path)!r}, "/nowhere")):
    os.environ[guard.MARKER_NAME] = {str(tmp_path)!r}
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    print(child.pid, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as supervisor:
        child = int(supervisor.stdout.readline())
        assert alive(child)
        supervisor.kill()
    assert eventually(lambda: not alive(child))


@linux
def test_a_sweep_spares_processes_of_other_instances(tmp_path):
    ours, other = tmp_path / "ours", tmp_path / "other"
    with (
        subprocess.Popen(SLEEP, env={guard.MARKER_NAME: str(ours)}) as one,
        subprocess.Popen(SLEEP, env={guard.MARKER_NAME: str(other)}) as two,
    ):
        assert eventually(lambda: b"sleep" in Path(f"/proc/{two.pid}/cmdline").read_bytes())
        assert guard.sweep(guard.Mark(str(ours), str(tmp_path / "ray")), sleep=lambda _: None) == 1
        assert one.wait(30) == -9
        assert alive(two.pid)
        two.kill()


def test_this_process_is_never_its_own_leftover(monkeypatch, tmp_path):
    monkeypatch.setenv(guard.MARKER_NAME, str(tmp_path))
    assert os.getpid() not in guard.Mark(str(tmp_path), str(tmp_path)).owned()


def test_adopting_orphans_says_whether_the_kernel_can():
    """Told by a process of its own, so that this one stays as it is."""
    done = subprocess.run(
        [sys.executable, "-c", "import ops.processes as p; print(p.adopt_orphans())"], capture_output=True
    )
    assert done.stdout.strip() == (b"True" if sys.platform.startswith("linux") else b"False")
